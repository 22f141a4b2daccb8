// Elements and small helpers. What a model or a server writes becomes text nodes and is never read as HTML.

const $ = id => document.getElementById(id);

/** An element: "tag.class.class", its attributes ("onclick" adds a listener), and children (strings become text nodes). */
function el(tag, attributes, ...children) {
  const [name, ...classes] = tag.split(".");
  const node = document.createElement(name);
  if (classes.length) node.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter(child => child != null && child !== false));
  return node;
}

function show(node, visible) {
  node.hidden = !visible;
}

/** Set a text only when it differs, so that screen readers do not hear it again. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Set the children only when they differ, so that a selection and a reader's place stay. */
function setChildren(node, children) {
  const same = node.childNodes.length === children.length && children.every((child, at) => child.isEqualNode(node.childNodes[at]));
  if (!same) node.replaceChildren(...children);
}

function sizeText(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (bytes >= 1024 && power < units.length - 1) {
    bytes /= 1024;
    power += 1;
  }
  return `${power ? bytes.toFixed(1) : bytes} ${units[power]}`;
}

function secondsText(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** What this tab keeps across a reload. */
const stored = {
  get(name, fallback) {
    try {
      return JSON.parse(sessionStorage.getItem(`tpserve.${name}`)) ?? fallback;
    } catch {
      return fallback;
    }
  },
  set(name, value) {
    try {
      sessionStorage.setItem(`tpserve.${name}`, JSON.stringify(value));
    } catch {
      // full, or not allowed: the page works without it
    }
  },
};

async function copyText(text, field) {
  try {
    await navigator.clipboard.writeText(text); // only where the page has a secure origin
    return true;
  } catch {
    field?.select();
    return field ? document.execCommand("copy") : false;
  }
}
