// The status view: /readyz, /server_info and /metrics, read every two seconds while it is shown (more often while the server loads), /readyz in the chat too.

const PERIOD_MS = 2000;
const LOADING_PERIOD_MS = 500; // phases are short
const SILENT_S = 2;
const charts = {
  tokens: new Chart("Tokens a second", ["generated", "prompt"], value => value.toFixed(value < 10 ? 1 : 0)),
  ttft: new Chart("Time to first token", ["median", "95%"], secondsText),
  itl: new Chart("Between tokens", ["median", "95%"], secondsText),
  queue: new Chart("Requests", ["running", "waiting"], value => value.toFixed(0), 1),
  cache: new Chart("KV cache in use", [""], value => `${(100 * value).toFixed(1)}%`, 1),
};
const phases = []; // {name, begin, end} in ms, as this page has seen them
let before = null; // {metrics, at}: the reading before
let ready = null; // the last body of /readyz

async function poll() {
  try {
    const answer = await getJson("readyz");
    ready = answer?.body ?? null;
    showState();
    if (!$("view-status").hidden && document.visibilityState === "visible") await Promise.all([pollInfo(), pollMetrics()]);
  } finally {
    setTimeout(poll, $("loading").hidden ? PERIOD_MS : LOADING_PERIOD_MS);
  }
}

function showState() {
  const state = ready?.state ?? "unreachable";
  const words = { running: "ready", paused: "paused", unreachable: "no server answers" }[state] ?? `${state} ${ready.percent}%: ${ready.phase}`;
  setText($("state"), words);
  $("state").dataset.state = state;
  $("send").disabled = !["running", "recovering"].includes(state);
  const loading = state === "starting" || state === "recovering";
  show($("loading"), loading);
  if (loading) $("loading-bar").value = ready.percent;
  notePhase(loading ? `${ready.phase || state}` : null);
}

/** The phases that this page has seen, with the time that each took. */
function notePhase(name) {
  const last = phases.at(-1);
  if (last?.name === name && !last.end) return drawPhases();
  if (last && !last.end) last.end = performance.now();
  if (name !== null) phases.push({ name, begin: performance.now(), end: 0 });
  return drawPhases();
}

function drawPhases() {
  const texts = phases.slice(-12).map(({ name, begin, end }) => `${name}: ${secondsText(((end || performance.now()) - begin) / 1000)}`);
  const list = $("phases");
  while (list.childElementCount > texts.length) list.lastChild.remove();
  texts.forEach((text, at) => setText(list.children[at] ?? list.appendChild(el("li")), text));
}

// /server_info

async function pollInfo() {
  const answer = await getJson("server_info", keys.admin || keys.api);
  if (answer?.status !== 200) {
    const hint = answer?.status === 401 ? "The ranks need the admin key: see Keys." : answer?.body.error?.message;
    setText($("status-notice"), hint ?? "No server answers.");
    show($("status-notice"), true);
    return;
  }
  show($("status-notice"), false);
  showInfo(answer.body);
}

function showInfo(info) {
  const { config, layout } = info;
  const facts = [
    ["Model", config.served_model_name.join(", ")],
    ["Layout", `TP ${layout.tp} x PP ${layout.pp} on ${config.device}, ${config.dtype}${config.quantization ? `, ${config.quantization}` : ""}`],
    ["Context", info.max_model_len ? `${info.max_model_len.toLocaleString("en")} tokens` : "not known yet"],
    ["Numerics", info.numerics ?? "not known yet"],
    ["Epoch", String(info.epoch)],
    ["Version", `tpserve ${info.version}`],
  ];
  if (info.reason) facts.unshift(["Reason", info.reason]);
  setChildren($("facts"), facts.map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, value))));
  setChildren($("stages"), layout.layers.map((_, stage) => stageNode(stage, info.ranks.filter(rank => rank.stage === stage))));
  showRecoveries(info);
  setText($("server-log"), [...info.log.first, ...info.log.last].join("\n"));
  showDefaults(config.sampling_defaults);
}

function stageNode(stage, ranks) {
  const { layers } = ranks[0].shard;
  const nodes = Map.groupBy ? Map.groupBy(ranks, rank => rank.node) : groupByNode(ranks);
  const groups = [...nodes].map(([node, members]) => {
    const title = node === null ? "no node yet" : `node ${node} · ${members[0].host}`;
    return el("section.node", { class: `node node-${(node ?? 0) % 6}` }, el("h4", null, title), el("ul", null, ...members.map(shardNode)));
  });
  return el("li.stage", null, el("h3", null, `Stage ${stage}`), el("p", null, `layers ${layers[0]}-${layers[1] - 1}`), ...groups);
}

function groupByNode(ranks) {
  const groups = new Map();
  for (const rank of ranks) groups.set(rank.node, [...(groups.get(rank.node) ?? []), rank]);
  return groups;
}

function shardNode(rank) {
  const silent = (rank.silent_s ?? 0) > SILENT_S;
  const state = silent ? `silent for ${secondsText(rank.silent_s)}` : rank.state;
  const health = silent ? "bad" : { running: "good", up: "good", draining: "good", missing: "none", stopped: "bad" }[rank.state] ?? "busy";
  const { heads } = rank.shard;
  const loading = rank.state === "starting" && rank.phase;
  return el(`li.shard.${health}`, null,
    el("div.row", null, el("strong", null, `rank ${rank.rank}`), el("span.health", null, state)),
    el("span", null, heads ? `heads ${heads[0]}-${heads[1] - 1}` : `shard ${rank.shard.tp_rank}`),
    rank.memory ? memoryNode(rank.memory) : null,
    loading ? el("span", null, rank.phase, el("progress", { max: 100, value: rank.percent, "aria-label": `rank ${rank.rank}` })) : null,
    rank.last_error ? el("span.error", null, rank.last_error) : null);
}

const PARTS = ["weights", "kv_cache", "work", "others", "free"];
const PART_NAMES = { weights: "weights", kv_cache: "KV cache", work: "activations", others: "other processes", free: "free" };

/** A bar of a rank's memory. The same numbers are its name for screen readers, and its text. */
function memoryNode(ledger) {
  const parts = { ...ledger, work: ledger.activations + ledger.head + ledger.slots + ledger.graphs + ledger.communication };
  parts.free = Math.max(0, ledger.total - parts.weights - parts.kv_cache - parts.work - ledger.others);
  const name = PARTS.filter(part => parts[part]).map(part => `${PART_NAMES[part]} ${sizeText(parts[part])}`).join(", ");
  const bar = el("div.memory", { role: "img", "aria-label": `memory of ${sizeText(ledger.total)}: ${name}`, title: name });
  for (const part of PARTS.filter(each => parts[each])) {
    const piece = el(`span.part-${part}`);
    piece.style.flexGrow = String(parts[part] / ledger.total);
    bar.append(piece);
  }
  return el("div", null, bar, el("small", null, `${sizeText(parts.weights)} weights, ${sizeText(parts.kv_cache)} KV of ${sizeText(ledger.total)}`));
}

function showRecoveries(info) {
  const times = info.recoveries ? `${info.recoveries} so far; answers that were open go on: ${info.resumption}.` : "None since the start.";
  setText($("recoveries"), times);
  const rows = [...info.faults].reverse().map(fault => {
    const when = new Date(Math.round(Date.now() / 1000 - fault.ago_s) * 1000).toLocaleTimeString();
    const end = fault.took_s === null ? "going on" : `recovered in ${secondsText(fault.took_s)}`;
    return el("li", null, el("time", null, when), ` ${fault.reason} (epoch ${fault.epoch}): ${end}`);
  });
  setChildren($("faults"), rows);
}

// /metrics

async function pollMetrics() {
  let text;
  try {
    text = await (await call("metrics", { key: keys.metrics, signal: AbortSignal.timeout(5000) })).text();
  } catch (error) {
    if (error.status === 401) setText($("charts-title"), "The charts need the metrics key: see Keys");
    return;
  }
  setText($("charts-title"), "Load");
  const now = { metrics: parseMetrics(text), at: performance.now() };
  if (before) showMetrics(now, before);
  before = now;
}

function showMetrics(now, last) {
  const seconds = (now.at - last.at) / 1000;
  const rate = name => Math.max(0, total(now.metrics, name) - total(last.metrics, name)) / seconds;
  const latency = name => [0.5, 0.95].map(share => quantile(now.metrics, last.metrics, name, share));
  charts.tokens.push([rate("generation_tokens_total"), rate("prompt_tokens_total")]);
  charts.ttft.push(latency("time_to_first_token_seconds"));
  charts.itl.push(latency("inter_token_latency_seconds"));
  charts.queue.push([total(now.metrics, "num_requests_running"), total(now.metrics, "num_requests_waiting")]);
  charts.cache.push([total(now.metrics, "kv_cache_usage_perc")]);
}
