// The conversation: a list of messages, one element each, and at most one answer that is being written.
//
// message   {role, content, reasoning, calls, callId, name, tokens, finish, note, error}
// Only `runAnswer` appends to a message; everything else replaces the list behind a place and asks again.

let messages = stored.get("messages", []);
let running = null; // the AbortController of the answer that is being written
let spoken = 0; // characters of it that the announcer has said

/** Say something to screen readers. */
function announce(text) {
  const announcer = $("announcer");
  announcer.append(el("p", null, text));
  while (announcer.childElementCount > 4) announcer.firstElementChild.remove();
}

function keepMessages() {
  stored.set("messages", messages.map(({ node, tokens, scheduled, ...message }) => message));
}

/** The conversation of this tab before a reload, which has ended an answer that was being written. */
function restoreMessages() {
  for (const message of messages.filter(each => each.running)) Object.assign(message, { running: false, note: "stopped by a reload" });
  setMessages(messages);
}

function setMessages(list) {
  messages = list;
  keepMessages();
  $("messages").replaceChildren(...messages.map(messageNode));
  if (!messages.length) $("messages").append(el("p.empty", null, "Ask the model something."));
  scrollDown(true);
}

const NAMES = { user: "You", assistant: "Model", tool: "Tool result" };

function messageNode(message) {
  const node = el(`article.message.${message.role}`, { "aria-label": NAMES[message.role] });
  message.node = node;
  renderMessage(message);
  return node;
}

/** Make a message's element show what the message holds now. */
function renderMessage(message) {
  const { node, role } = message;
  const parts = node.parts ??= messageParts(message);
  if (message.reasoning) {
    show(parts.thoughts, true);
    setText(parts.summary, message.content || message.finish ? "Reasoning" : "Reasoning ...");
    renderMarkdown(parts.reasoning, message.reasoning);
  }
  if (message.tokens?.length && !message.plain) {
    renderTokens(parts.content, message.tokens);
    if (message.finish && !message.reasoning) dimBeyond(parts.content, message.content);
  } else if (role === "assistant") renderMarkdown(parts.content, message.content);
  else setText(parts.content, message.content);
  show(parts.switch, message.tokens?.length);
  setText(parts.switch, message.plain ? "Show tokens" : "Show as text");
  renderCalls(message, parts.calls);
  setText(parts.error, message.error ?? "");
  show(parts.error, message.error);
  setText(parts.note, message.note ?? "");
  node.toggleAttribute("data-running", Boolean(message.running));
  node.setAttribute("aria-busy", String(Boolean(message.running)));
}

function messageParts(message) {
  const { role, node } = message;
  const summary = el("summary", null, "Reasoning");
  const parts = {
    summary,
    reasoning: el("div.text"),
    content: el(role === "assistant" ? "div.text" : "div.text.plain"),
    calls: el("div.calls"),
    error: el("p.error", { role: "alert", hidden: true }),
    note: el("span.note"),
  };
  parts.thoughts = el("details.reasoning", { hidden: true }, summary, parts.reasoning);
  const button = (text, action, label = text) => el("button", { type: "button", "aria-label": label, onclick: () => action(message) }, text);
  const actions = role === "tool" ? [] : [button("Edit", editMessage, `Edit: ${NAMES[role]}`)];
  if (role === "assistant") actions.push(button("Regenerate", regenerate), button("Copy", copyMessage, "Copy the answer"));
  parts.switch = button("", switchTokens, null);
  const title = role === "tool" ? `${NAMES.tool}: ${message.name}` : NAMES[role];
  node.append(el("h3", null, title), parts.thoughts, parts.content, parts.calls, parts.error, el("footer", null, ...actions, parts.switch, parts.note));
  return parts;
}

/** The calls that the model makes, and a box for the result of each once they are complete. */
function renderCalls(message, node) {
  const calls = message.calls ?? [];
  while (node.childElementCount > calls.length) node.lastChild.remove();
  calls.forEach((call, at) => {
    node.children[at] ?? node.append(el("section.call", { "aria-label": "Tool call" }, el("h4"), el("pre", { tabindex: "0" })));
    const [name, text] = node.children[at].children;
    setText(name, `calls ${call.function.name}`);
    setText(text, prettyJson(call.function.arguments));
  });
  const open = calls.length && !message.running && messages.at(-1) === message;
  const form = node.querySelector("form");
  if (open && !form) node.lastChild.append(resultForm(message));
  if (!open && form) form.remove();
}

function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function resultForm(message) {
  const boxes = message.calls.map(call =>
    el("label", null, `Result of ${call.function.name}`, el("textarea.code", { rows: "2" })));
  const send = event => {
    event.preventDefault();
    const results = message.calls.map((call, at) =>
      ({ role: "tool", callId: call.id, name: call.function.name, content: boxes[at].querySelector("textarea").value }));
    ask([...messages, ...results]);
  };
  return el("form.results", { onsubmit: send }, ...boxes, el("button", null, "Send results"));
}

function scrollDown(always) {
  const list = $("messages");
  if (always || list.scrollHeight - list.scrollTop - list.clientHeight < 120) list.scrollTop = list.scrollHeight;
}

// What the buttons do

function regenerate(message) {
  const at = messages.indexOf(message);
  if (at > 0 || messages.length === 0) ask(messages.slice(0, at));
}

async function copyMessage(message) {
  if (await copyText(message.content)) announce("Copied");
  else openSnippet("Answer", message.content);
}

function switchTokens(message) {
  message.plain = !message.plain;
  const fresh = el("div.text");
  message.node.parts.content.replaceWith(fresh);
  message.node.parts.content = fresh;
  renderMessage(message);
}

/** A box in place of the text. A question that was edited is asked again; an answer keeps what follows it. */
function editMessage(message) {
  if (running || message.node.querySelector("form.edit")) return;
  const box = el("textarea", { "aria-label": `Edit: ${NAMES[message.role]}`, rows: "3" });
  box.value = message.content;
  const close = () => {
    form.replaceWith(message.node.parts.content);
    message.node.querySelector("footer button")?.focus();
  };
  const save = event => {
    event.preventDefault();
    const edited = { role: message.role, content: box.value, reasoning: message.reasoning, calls: message.calls };
    const at = messages.indexOf(message);
    if (message.role === "user") ask([...messages.slice(0, at), edited]);
    else setMessages([...messages.slice(0, at), edited, ...messages.slice(at + 1)]);
  };
  const onkeydown = event => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save(event);
  };
  const buttons = el("div.row", null, el("button.main", null, message.role === "user" ? "Ask again" : "Keep"),
    el("button", { type: "button", onclick: close }, "Cancel"));
  const form = el("form.edit", { onsubmit: save, onkeydown }, box, buttons);
  message.node.parts.content.replaceWith(form);
  box.focus();
}

// Asking

/** Show `list` as the conversation and ask for the message behind it. */
async function ask(list) {
  if (running) return;
  let body;
  try {
    body = requestBody(list);
  } catch (error) {
    if (error instanceof SettingError) return;
    throw error;
  }
  const answer = { role: "assistant", content: "", running: true };
  setMessages([...list, answer]);
  await runAnswer(answer, body);
}

async function runAnswer(answer, body) {
  running = new AbortController();
  spoken = 0;
  showRunning(true);
  const begin = performance.now();
  let first = 0;
  const decoder = new TextDecoder();
  try {
    const request = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await call("v1/chat/completions", { body: request, key: keys.api, signal: running.signal });
    for await (const event of events(response)) {
      if (event.usage) answer.usage = event.usage;
      if (!event.choices[0]) continue;
      if (takeChoice(answer, event.choices[0], decoder)) first ||= performance.now();
      drawSoon(answer);
    }
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "stopped";
    else {
      answer.error = error instanceof ServerError ? error.message : `no answer from the server: ${error.message}`;
      if (error.status === 401) openKeys();
    }
  }
  running = null;
  answer.running = false;
  answer.note = noteOf(answer, first - begin, performance.now() - first, first > 0);
  renderMessage(answer);
  announce(answer.content.slice(spoken));
  announce(answer.error ? `Error: ${answer.error}` : answer.finish === "stopped" ? "Stopped." : "The answer is complete.");
  showRunning(false);
  keepMessages();
}

/** Append what one chunk adds; whether it held something that the model wrote. */
function takeChoice(answer, choice, decoder) {
  const { delta, logprobs, finish_reason: finish } = choice;
  const reasoning = delta.reasoning_content ?? delta.reasoning;
  if (reasoning) answer.reasoning = (answer.reasoning ?? "") + reasoning;
  if (delta.content) answer.content += delta.content;
  for (const piece of delta.tool_calls ?? []) {
    const calls = answer.calls ??= [];
    const call = calls[piece.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } };
    call.id ||= piece.id ?? "";
    call.function.name += piece.function?.name ?? "";
    call.function.arguments += piece.function?.arguments ?? "";
  }
  if (logprobs?.content) (answer.tokens ??= []).push(...readTokens(logprobs.content, decoder));
  if (finish) answer.finish = finish;
  return Boolean(reasoning || delta.content || delta.tool_calls?.length);
}

/** Draw once a frame at most, and say whole sentences. */
function drawSoon(answer) {
  if (answer.scheduled) return;
  answer.scheduled = true;
  requestAnimationFrame(() => {
    answer.scheduled = false;
    if (!answer.running) return;
    renderMessage(answer);
    scrollDown(false);
    const end = Math.max(...[". ", "! ", "? ", "\n"].map(mark => answer.content.lastIndexOf(mark)));
    if (end >= spoken) {
      announce(answer.content.slice(spoken, end + 1));
      spoken = end + 1;
    }
  });
}

function noteOf(answer, ttftMs, tookMs, any) {
  const ends = { length: "cut at the longest answer", stopped: "stopped", tool_calls: "calls tools" };
  const parts = [ends[answer.finish]];
  const count = answer.usage?.completion_tokens;
  if (count) parts.push(`${count} token${count === 1 ? "" : "s"}`);
  if (any) parts.push(`first after ${secondsText(ttftMs / 1000)}`);
  if (count > 1 && tookMs > 0) parts.push(`${((count - 1) / (tookMs / 1000)).toFixed(1)} tokens/s`);
  return parts.filter(Boolean).join(" · ");
}

function showRunning(on) {
  show($("stop"), on);
  show($("send"), !on);
  if (on) return;
  if (document.activeElement === document.body || document.activeElement === $("stop")) $("prompt").focus();
}

function stopAnswer() {
  running?.abort();
}
