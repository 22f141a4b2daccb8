// An answer as its tokens, each with its probability and the likeliest ones beside it. Pointer, touch or arrow keys.

const percent = logprob => `${(100 * Math.exp(logprob)).toFixed(logprob > -2.3 ? 0 : 2)}%`;

/** The tokens of one chunk. `decoder` joins the bytes of a character that several tokens share. */
function readTokens(entries, decoder) {
  return entries.map(entry => ({
    text: entry.bytes ? decoder.decode(new Uint8Array(entry.bytes), { stream: true }) : entry.token,
    name: entry.token,
    logprob: entry.logprob,
    top: entry.top_logprobs.map(each => [each.token, each.logprob]),
  }));
}

/** Make `node` show tokens; those that it shows already stay. */
function renderTokens(node, tokens) {
  if (node.childElementCount > tokens.length || !node.isTokens) {
    node.isTokens = true;
    node.replaceChildren();
    node.setAttribute("tabindex", "0");
    node.setAttribute("role", "group");
    node.setAttribute("aria-label", "Tokens with their probabilities; arrow keys go through them");
    node.onkeydown = event => stepThroughTokens(node, event);
    node.onpointerover = event => event.target.token && showTip(event.target);
    node.onpointerleave = node.onblur = hideTip;
  }
  for (const token of tokens.slice(node.childElementCount)) {
    const span = el("span.token", null, token.text);
    span.token = token;
    span.classList.add(token.logprob > -0.22 ? "sure" : token.logprob > -1.2 ? "likely" : "unlikely");
    node.append(span);
  }
}

/** Dim the tokens that are not in the text of an answer, such as the one that ends it. */
function dimBeyond(node, text) {
  let length = 0;
  for (const span of node.children) {
    length += span.textContent.length;
    span.classList.toggle("beyond", length > text.length);
  }
}

function stepThroughTokens(node, event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") hideTip();
  if (!step || !node.childElementCount) return;
  event.preventDefault();
  const now = node.querySelector(".current");
  const next = now ? (step > 0 ? now.nextElementSibling : now.previousElementSibling) : node.firstElementChild;
  if (next) showTip(next);
}

function showTip(span) {
  hideTip();
  span.classList.add("current");
  const { name, logprob, top } = span.token;
  const rows = top.map(([text, value]) =>
    el("tr", { class: text === name ? "drawn" : null }, el("td", null, JSON.stringify(text)), el("td", null, percent(value))));
  const tip = $("tip");
  tip.replaceChildren(el("p", null, el("strong", null, JSON.stringify(name)), ` ${percent(logprob)}`), el("table", null, ...rows));
  show(tip, true);
  const place = span.getBoundingClientRect();
  const left = Math.max(4, Math.min(place.left, innerWidth - tip.offsetWidth - 4));
  const below = place.bottom + tip.offsetHeight + 6 < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? place.bottom + 4 : Math.max(4, place.top - tip.offsetHeight - 4)}px`;
  announce(`${name}, ${percent(logprob)}`);
}

function hideTip() {
  document.querySelector(".token.current")?.classList.remove("current");
  show($("tip"), false);
}
