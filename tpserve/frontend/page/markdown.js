// A part of Markdown as DOM nodes: paragraphs, code, lists, bold. Everything else stays text. Time is linear in the text.

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+/;

/** Cut a text into blocks, so that a stream renders only its last one again. */
function blocksOf(text) {
  const blocks = [];
  let open = [];
  let fence = "";
  const close = () => {
    if (open.length) blocks.push(open.join("\n"));
    open = [];
  };
  for (const line of text.split("\n")) {
    const mark = FENCE.exec(line);
    if (fence) {
      open.push(line);
      if (mark && mark[1].startsWith(fence) && !mark[2]) {
        fence = "";
        close();
      }
    } else if (mark) {
      close();
      open.push(line);
      fence = mark[1];
    } else if (!line.trim()) {
      close();
    } else {
      const starts = ITEM.test(line) && open.length && !ITEM.test(open[0]);
      if (starts || /^#{1,6} /.test(line)) close();
      open.push(line);
      if (/^#{1,6} /.test(line)) close();
    }
  }
  close();
  return blocks;
}

/** Make `node` show `text`; blocks that have not changed keep their elements. */
function renderMarkdown(node, text) {
  const blocks = blocksOf(text);
  const shown = node.blocks ?? [];
  let same = 0;
  while (same < shown.length && shown[same] === blocks[same]) same += 1;
  while (node.childNodes.length > same) node.lastChild.remove();
  for (const block of blocks.slice(same)) node.append(blockNode(block));
  node.blocks = blocks;
}

function blockNode(block) {
  const lines = block.split("\n");
  const mark = FENCE.exec(lines[0]);
  if (mark) return codeNode(mark[2], lines.slice(1).filter((line, at, all) => at < all.length - 1 || !line.startsWith(mark[1])));
  if (ITEM.test(lines[0])) return listNode(lines);
  const heading = /^#{1,6} +(.*)$/.exec(block);
  if (heading) return el("p", null, el("strong", null, ...inline(heading[1])));
  return el("p", null, ...inline(block));
}

function codeNode(language, lines) {
  const text = lines.join("\n");
  const copy = el("button.copy", { type: "button", onclick: () => copyText(text).then(done => done && (copy.textContent = "Copied")) }, "Copy");
  const head = el("div.code-head", null, el("span", null, language || "code"), copy);
  return el("div.code-block", null, head, el("pre", { tabindex: "0" }, el("code", null, text)));
}

/** Items of a list; deeper ones are told by their indent. */
function listNode(lines) {
  const root = newList(lines[0]);
  const open = [{ indent: ITEM.exec(lines[0])[1].length, list: root }];
  let item = [];
  let node = null;
  const finish = () => node?.prepend(...inline(item.join("\n")));
  for (const line of lines) {
    const mark = ITEM.exec(line);
    if (!mark) {
      item.push(line.trim());
      continue;
    }
    finish();
    const indent = mark[1].length;
    while (open.length > 1 && indent < open.at(-1).indent) open.pop();
    if (indent > open.at(-1).indent + 1 && open.length < 8) {
      const list = newList(line);
      node.append(list);
      open.push({ indent, list });
    }
    node = el("li");
    item = [line.slice(mark[0].length)];
    open.at(-1).list.append(node);
  }
  finish();
  return root;
}

function newList(line) {
  const number = /^\s*(\d{1,9})/.exec(line);
  return number ? el("ol", { start: number[1] }) : el("ul");
}

/** Text with `code` and **bold** as nodes. */
function inline(text) {
  const nodes = [];
  const missing = new Set(); // delimiters that do not come again, so that each is looked for once
  let from = 0;
  let at = 0;
  while (at < text.length) {
    const mark = delimiterAt(text, at);
    if (!mark) {
      at += 1;
      continue;
    }
    const end = missing.has(mark) ? -1 : text.indexOf(mark, at + mark.length + 1);
    if (end < 0) {
      missing.add(mark);
      at += mark.length;
      continue;
    }
    if (at > from) nodes.push(text.slice(from, at));
    const inner = text.slice(at + mark.length, end);
    nodes.push(mark === "**" ? el("strong", null, inner) : el("code", null, mark.length > 1 ? inner.trim() : inner));
    at = from = end + mark.length;
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}

function delimiterAt(text, at) {
  if (text.startsWith("**", at)) return "**";
  if (text[at] !== "`") return "";
  let end = at;
  while (text[end] === "`") end += 1;
  return text.slice(at, end);
}
