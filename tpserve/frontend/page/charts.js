// Live charts as SVG, and Prometheus' text format read into them.

const POINTS = 150; // five minutes; a young chart shows its first minute
const FIRST_POINTS = 30;
const [WIDTH, HEIGHT] = [300, 80];

class Chart {
  /** `series`: the name of each line. `format`: a value as text. `least`: the smallest upper end of the axis. */
  constructor(title, series, format, least = 0) {
    Object.assign(this, { title, series, format, least, points: series.map(() => []) });
    const lines = series.map((name, at) => svg("polyline", { class: `line line-${at}`, fill: "none" }));
    this.picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" }, ...lines);
    this.values = series.map((name, at) => el(`span.value.value-${at}`));
    this.top = el("span.axis");
    this.node = el("figure.chart", null, el("figcaption", null, el("h3", null, title), ...this.values), this.picture, this.top);
    this.draw();
  }

  /** Add one value a line; null where there is none. */
  push(values) {
    values.forEach((value, at) => {
      this.points[at].push(value);
      if (this.points[at].length > POINTS) this.points[at].shift();
    });
    this.draw();
  }

  draw() {
    const most = Math.max(this.least, ...this.points.flat().filter(value => value !== null));
    const scale = most > 0 ? (HEIGHT - 4) / most : 0;
    const texts = this.series.map((name, at) => {
      const last = this.points[at].findLast(value => value !== null);
      const text = `${name} ${last == null ? "-" : this.format(last)}`.trim();
      setText(this.values[at], text);
      return text;
    });
    this.points.forEach((points, at) => {
      const span = Math.max(FIRST_POINTS, points.length);
      const step = WIDTH / (span - 1);
      const from = span - points.length;
      const places = points.map((value, i) => value === null ? "" : `${((from + i) * step).toFixed(1)},${(HEIGHT - 2 - value * scale).toFixed(1)}`);
      this.picture.children[at].setAttribute("points", places.filter(Boolean).join(" "));
    });
    setText(this.top, most > 0 ? this.format(most) : "");
    this.picture.setAttribute("aria-label", `${this.title}: ${texts.join(", ")}`);
  }
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Prometheus' text format: for each name without its prefix a list of {labels, value}. */
function parseMetrics(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^tpserve:(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const le = /(?:^|,)le="([^"]*)"/.exec(match[2] ?? "");
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ le: le && Number(le[1].replace("+Inf", "Infinity")), value: Number(match[3]) });
  }
  return found;
}

const total = (metrics, name) => (metrics.get(name) ?? []).reduce((sum, { value }) => sum + value, 0);

/** A quantile of what a histogram gained between two readings, by straight lines within its buckets; null without any. */
function quantile(now, before, name, share) {
  const old = new Map((before.get(`${name}_bucket`) ?? []).map(({ le, value }) => [le, value]));
  const gained = (now.get(`${name}_bucket`) ?? []).map(({ le, value }) => ({ le, count: value - (old.get(le) ?? 0) }));
  const all = gained.at(-1)?.count ?? 0;
  if (all <= 0) return null;
  let [low, below] = [0, 0];
  for (const { le, count } of gained) {
    if (count >= share * all) return le === Infinity ? low : low + (le - low) * ((share * all - below) / (count - below));
    [low, below] = [le, count];
  }
  return low;
}
