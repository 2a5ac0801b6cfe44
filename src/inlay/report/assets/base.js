// Elements, numbers and the shared state. All text goes in as text nodes, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const MISSING = "–";

function make(namespace, tag, attributes, children) {
  const node = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...present(children));
  return node;
}
const present = (children) => children.flat().filter((child) => child !== null && child !== undefined);
const fill = (node, ...children) => node.replaceChildren(...present(children));
const el = (tag, attributes, ...children) => make(null, tag, attributes, children);
const svg = (tag, attributes, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);

// Numbers as people read them; the same rules as in numbers.py.
function inThousands(value, units, space) {
  let power = 0;
  while (power < units.length - 1 && Number(value.toFixed(power ? 1 : 0)) >= 1000) { value /= 1000; power += 1; }
  return power ? value.toFixed(1) + space + units[power] : (value.toFixed(0) + space + units[0]).trimEnd();
}
const two = (value) => String(value).padStart(2, "0");
const format = {
  count: (value) => inThousands(value, ["", "K", "M", "B", "T"], ""),
  bytes: (value) => inThousands(value, ["B", "kB", "MB", "GB", "TB"], " "),
  seconds(value) {
    if (value < 59.5) return value.toFixed(value >= 9.95 ? 0 : value >= 0.995 ? 1 : 2) + " s";
    const whole = Math.round(value), minutes = Math.round(value / 60);
    if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
    return `${Math.floor(minutes / 60)} h ${two(minutes % 60)} min`;
  },
  ratio: (value) => value.toFixed(value >= 9.995 ? 0 : 2) + "×",
  percent(value) {
    if (value === 0) return "0 %";
    if (value >= 0.995) return value.toFixed(value >= 9.95 ? 0 : 1) + " %";
    return value.toFixed(1 - Math.floor(Math.log10(value))) + " %";
  },
};
const show = (unit, value) => (value === null || value === undefined ? MISSING : format[unit](value));

const qualities = new Map(data.qualities.map((quality) => [quality.name, quality]));
const costs = new Map(data.costs.map((cost) => [cost.name, cost]));
const kinds = new Map(data.kinds.map((kind, index) => [kind.name, { ...kind, style: `k${index}` }]));
const finished = data.rows.filter((row) => row.status === "finished");
const failures = data.rows.filter((row) => row.status === "failed");
const rowOf = new Map(finished.map((row) => [row.method, row]));

const measured = (row, name) => (name === "average" ? row.average : row.metrics[name]);
function showQuality(name, value) {
  const scale = qualities.get(name);
  return value === null || value === undefined ? MISSING : (value * scale.factor).toFixed(scale.decimals);
}
function showSpread(name, value) {
  return showQuality(name, value.mean) + (value.deviation === null ? "" : ` ± ${showQuality(name, value.deviation)}`);
}
const inSeeds = (seeds) => `seed${seeds.length === 1 ? "" : "s"} ${seeds.join(", ")}`;
const reason = (row) => row.error.trim() || "no reason given";

const brief = (label) => (label.length > 30 ? `${label.slice(0, 29)}…` : label); // in plots; the tooltip says it all

function glyph(kind, size = 5, extra = "") {
  const { style, path } = kinds.get(kind);
  const half = size * 1.5;
  return svg("svg", { class: `glyph ${style} ${extra}`, width: 2 * half, height: 2 * half, "aria-hidden": "true",
    viewBox: `${-half} ${-half} ${2 * half} ${2 * half}` },
  svg("path", { d: path, transform: `scale(${size})`, fill: "currentColor" }));
}

// One selected method and one under the pointer, shared by plot, table, curves and details.
const state = { selected: null, hovered: null };
const watchers = [];
function watch(watcher) { watchers.push(watcher); }
function change(update) {
  Object.assign(state, update);
  for (const watcher of watchers) watcher();
}
const select = (method) => change({ selected: method });
const hover = (method) => { if (state.hovered !== method) change({ hovered: method }); };

// A row of buttons of which one is pressed.
function segmented(label, options, chosen, onChoose) {
  const buttons = options.map(([value, text]) => el("button", { type: "button", "data-value": value,
    "aria-pressed": String(value === chosen),
    onclick() {
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === value));
      onChoose(value);
    } }, text));
  return el("div", { class: "segmented", role: "group", "aria-label": label }, buttons);
}

// A small box of text beside a point of a figure.
function tooltip(figure) {
  const box = el("div", { class: "tip", role: "presentation", hidden: true });
  figure.append(box);
  return {
    show(x, y, heading, lines) {
      box.replaceChildren(el("strong", {}, heading), ...lines.map(([name, value]) =>
        el("div", { class: "pair" }, el("span", {}, name), el("span", {}, value))));
      box.hidden = false;
      const { width, height } = box.getBoundingClientRect();
      const left = Math.min(Math.max(x - width / 2, 4), figure.clientWidth - width - 4);
      const above = y - height - 16;
      box.style.left = `${Math.max(left, 0)}px`;
      box.style.top = `${above < 0 ? y + 16 : above}px`;
    },
    hide() { box.hidden = true; },
  };
}

// Draw now, and again when the figure's width changes.
function responsive(figure, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (figure.clientWidth !== width) { width = figure.clientWidth; draw(); }
  }).observe(figure);
}
