// Connects the parts: tabs, keys, settings, keyboard.

function showView(name) {
  for (const each of ["chat", "status"]) {
    const on = each === name;
    show($(`view-${each}`), on);
    $(`tab-${each}`).setAttribute("aria-selected", String(on));
    $(`tab-${each}`).tabIndex = on ? 0 : -1;
  }
  if (location.hash.slice(1) !== name) history.replaceState(null, "", `#${name}`);
}

function openSettings(open) {
  show($("settings"), open);
  $("toggle-settings").setAttribute("aria-expanded", String(open));
}

function openKeys() {
  $("api-key").value = keys.api;
  $("admin-key").value = keys.admin;
  $("metrics-key").value = keys.metrics;
  if (!$("keys").open) $("keys").showModal();
}

function openSnippet(title, text) {
  setText($("snippet-title"), title);
  $("snippet-text").value = text;
  setText($("snippet-copy"), "Copy");
  $("snippet").showModal();
  $("snippet-text").select();
  $("snippet-text").scrollTop = 0;
}

/** The request that the page sends next: the draft, or the last answer's once more. */
function showSnippet(title, textOf) {
  const draft = $("prompt").value.trim();
  const last = messages.at(-1)?.role === "assistant" ? messages.slice(0, -1) : messages;
  try {
    openSnippet(title, textOf(requestBody(draft ? [...messages, { role: "user", content: draft }] : last)));
  } catch (error) {
    if (!(error instanceof SettingError)) throw error;
  }
}

async function loadModels() {
  try {
    const { data } = await (await call("v1/models", { key: keys.api, signal: AbortSignal.timeout(5000) })).json();
    $("model").replaceChildren(...data.map(({ id }) => el("option", { value: id }, id)));
    document.title = `${data[0].id} · tpserve`;
  } catch (error) {
    if (error.status === 401) openKeys();
    else setTimeout(loadModels, PERIOD_MS);
  }
}

/** The server's own sampling defaults as the hints of empty fields. */
function showDefaults(defaults) {
  for (const [name, value] of Object.entries(defaults)) {
    const input = document.querySelector(`[data-field="${CSS.escape(name)}"]`);
    if (input && value !== null) input.placeholder = String(value);
  }
}

function send(event) {
  event?.preventDefault();
  const box = $("prompt");
  if (!box.value.trim() || running || $("send").disabled) return;
  const content = box.value;
  const before = messages;
  ask([...messages, { role: "user", content }]);
  if (messages === before) return; // a setting was refused
  box.value = "";
  box.style.height = "";
}

function editLastQuestion() {
  const last = messages.findLast(message => message.role === "user");
  if (last) editMessage(last);
}

function onPromptKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  else if (event.key === "ArrowUp" && !event.target.value) {
    event.preventDefault();
    editLastQuestion();
  }
}

/** Settings stay in the tab. */
function keepSettings() {
  const fields = [...document.querySelectorAll("#settings :is(input, select, textarea)")];
  const saved = stored.get("settings", {});
  for (const field of fields) {
    const name = field.id || field.dataset.field;
    if (name in saved) field[field.type === "checkbox" ? "checked" : "value"] = saved[name];
    field.addEventListener("change", () => {
      saved[name] = field.type === "checkbox" ? field.checked : field.value;
      stored.set("settings", saved);
    });
  }
}

function start() {
  for (const [at, name] of ["chat", "status"].entries()) {
    $(`tab-${name}`).addEventListener("click", () => showView(name));
    $(`tab-${name}`).addEventListener("keydown", event => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      const other = ["status", "chat"][at];
      showView(other);
      $(`tab-${other}`).focus();
    });
  }
  $("charts").append(...Object.values(charts).map(chart => chart.node));
  $("legend").append(...PARTS.map(part => el("span", null, el(`i.part-${part}`), PART_NAMES[part])));
  $("composer").addEventListener("submit", send);
  $("stop").addEventListener("click", stopAnswer);
  $("prompt").addEventListener("keydown", onPromptKey);
  $("prompt").addEventListener("input", ({ target }) => {
    target.style.height = "auto";
    target.style.height = `${Math.min(target.scrollHeight + 2, innerHeight * 0.4)}px`;
  });
  document.addEventListener("keydown", event => event.key === "Escape" && !document.querySelector("dialog[open]") && stopAnswer());
  $("new-chat").addEventListener("click", () => {
    stopAnswer();
    setMessages([]);
    $("prompt").focus();
  });
  $("copy-curl").addEventListener("click", () => showSnippet("The request as curl", curlText));
  $("copy-python").addEventListener("click", () => showSnippet("The request in Python", pythonText));
  $("toggle-settings").addEventListener("click", () => openSettings($("settings").hidden));
  $("close-settings").addEventListener("click", () => {
    openSettings(false);
    $("toggle-settings").focus();
  });
  $("open-keys").addEventListener("click", openKeys);
  $("keys").addEventListener("close", () => {
    const typed = { api: $("api-key").value, admin: $("admin-key").value, metrics: $("metrics-key").value };
    if (Object.keys(typed).every(name => typed[name] === keys[name])) return;
    Object.assign(keys, typed);
    stored.set("keys", keys);
    loadModels();
  });
  $("snippet-copy").addEventListener("click", async () => {
    if (await copyText($("snippet-text").value, $("snippet-text"))) setText($("snippet-copy"), "Copied");
  });
  keepSettings();
  openSettings(innerWidth > 1000);
  restoreMessages();
  showView(location.hash === "#status" ? "status" : "chat");
  addEventListener("hashchange", () => showView(location.hash === "#status" ? "status" : "chat"));
  loadModels();
  pollInfo();
  poll();
  if (!$("view-chat").hidden) $("prompt").focus();
}

start();
