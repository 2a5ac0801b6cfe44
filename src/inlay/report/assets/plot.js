// Axes and label placement, shared by the two plots. The rules are those of axes.py and labels.py.

function linearTicks(low, high, wanted) {
  if (!(high > low)) return [low];
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((unit) => unit * power).find((value) => value >= raw * 0.75);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i += 1) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  const units = Math.log10(high / low) < 2.5 ? [1, 2, 5] : [1], ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const unit of units) ticks.push(unit * 10 ** power);
  }
  return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}

// low … high onto start … end; `zero` is the pixel of 0 beside a logarithm, `unit` what ticks are multiples of.
function axis({ low, high, start, end, log = false, zero = null, unit = 1, wanted = 6 }) {
  return {
    low, high, start, end, log, zero,
    place(value) {
      if (log && value <= 0) return zero === null ? start : zero;
      const part = log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
      return start + part * (end - start);
    },
    ticks() {
      const drawn = log ? logTicks(low, high) : linearTicks(low / unit, high / unit, wanted).map((t) => t * unit);
      return zero === null ? drawn : [0, ...drawn];
    },
  };
}

const timeUnit = (top) => (top < 180 ? [1, "s"] : top < 7200 ? [60, "min"] : [3600, "h"]);
function costAxis(cost, values, start, end, log, wanted) {
  const positive = values.filter((value) => value > 0);
  if (log && positive.length) {
    const zero = positive.length === values.length ? null : start + 12;
    const low = Math.min(...positive), high = Math.max(...positive);
    const pad = Math.max((high / low) ** 0.06, 1.25);
    return axis({ low: low / pad, high: high * pad, start: zero === null ? start : start + 40, end, log, zero });
  }
  const high = Math.max(0, ...values) * 1.06 || 1;
  return axis({ low: 0, high, start, end, unit: cost.unit === "seconds" ? timeUnit(high)[0] : 1, wanted });
}
function showTick(cost, value, top) {
  if (cost.unit !== "seconds") return show(cost.unit, value).replace(/\.0(?!\d)/, "");
  const [unit, word] = timeUnit(top);
  return `${Number((value / unit).toPrecision(6))} ${word}`;
}

const overlaps = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
const grown = (box, by) => [box[0] - by, box[1] - by, box[2] + by, box[3] + by];
function crosses([x1, y1, x2, y2], box) {
  let enter = 0, leave = 1;
  for (const [from, delta, low, high] of [[x1, x2 - x1, box[0], box[2]], [y1, y2 - y1, box[1], box[3]]]) {
    if (delta === 0) {
      if (!(low < from && from < high)) return false;
      continue;
    }
    const near = Math.min((low - from) / delta, (high - from) / delta);
    const far = Math.max((low - from) / delta, (high - from) / delta);
    enter = Math.max(enter, near); leave = Math.min(leave, far);
  }
  return enter < leave;
}

const WAYS = [[1, 0], [0, -1], [-1, 0], [0, 1], [0.7, -0.7], [0.7, 0.7], [-0.7, -0.7], [-0.7, 0.7]];
const BETWEEN = [[0.4, -0.9], [0.4, 0.9], [-0.4, -0.9], [-0.4, 0.9], [0.9, -0.4], [0.9, 0.4], [-0.9, -0.4], [-0.9, 0.4]];
const RINGS = [0, 12, 22, 34, 48, 64, 84, 110];

function besidePoint(x, y, width, height, radius, ring, [dx, dy]) {
  const side = Math.abs(dx) < 0.5 ? 0 : Math.sign(dx), reach = radius + 3 + ring;
  const cx = x + dx * reach + side * width / 2, cy = y + dy * (reach + height / 2);
  const box = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2];
  if (!ring) return { box, side, leader: null };
  const tip = [Math.min(Math.max(x, box[0]), box[2]), Math.min(Math.max(y, box[1]), box[3])];
  const inner = (radius + 1.5) / (Math.hypot(tip[0] - x, tip[1] - y) || 1);
  return { box, side, leader: [x + (tip[0] - x) * inner, y + (tip[1] - y) * inner, ...tip] };
}

function candidates(point, [width, height], radius, bounds, others, lines) {
  const found = [];
  RINGS.forEach((ring, step) => (ring ? [...WAYS, ...BETWEEN] : WAYS).forEach((way, rank) => {
    const label = besidePoint(...point, width, height, radius, ring, way), { box, leader } = label;
    if (box[0] < bounds[0] || box[1] < bounds[1] || box[2] > bounds[2] || box[3] > bounds[3]) return;
    if (others.some((mark) => overlaps(box, mark) || (leader && crosses(leader, mark)))) return;
    const near = grown(box, 8);
    const price = rank * 0.25 + step * 4 + 3 * lines.filter((line) => crosses(line, box)).length
      + 5 * others.filter((mark) => overlaps(near, mark)).length;
    found.push({ price, label });
  }));
  return found.sort((a, b) => a.price - b.price);
}

// One label per wanted point, null where none fits: greedy, and those that fared badly choose earlier in the next round.
function placeLabels(points, sizes, bounds, important, lines, radius, wanted) {
  const marks = points.map(([x, y]) => [x - radius, y - radius, x + radius, y + radius]);
  const choices = points.map((point, i) => (wanted[i] ? candidates(point, sizes[i], radius, bounds,
    marks.filter((_, j) => j !== i), lines) : []).map(({ price, label }) => ({ price: price * (important[i] ? 2 : 1), label })));
  const order = points.map((_, i) => i).sort((a, b) => important[b] - important[a]);
  const apart = (a, b) => !overlaps(a.box, b.box) && !(a.leader && crosses(a.leader, b.box));
  let best = { total: Infinity, placed: [] };
  for (let round = 0; round < 12; round += 1) {
    const prices = points.map(() => 100), placed = points.map(() => null);
    for (const i of order) {
      const taken = placed.filter(Boolean);
      const free = choices[i].find(({ label }) => taken.every((other) => apart(label, other) && apart(other, label)));
      if (free) { prices[i] = free.price; placed[i] = free.label; }
    }
    const total = prices.reduce((a, b) => a + b, 0);
    if (total < best.total) best = { total, placed };
    order.sort((a, b) => prices[b] - prices[a]);
  }
  return best.placed;
}

const canvas = document.createElement("canvas").getContext("2d");
function textWidth(text, weight = 400, size = 12.5) {
  canvas.font = `${weight} ${size}px ${getComputedStyle(document.body).fontFamily}`;
  return canvas.measureText(text).width;
}
const words = (x, y, text, style, anchor = "start") =>
  svg("text", { x: x.toFixed(1), y: y.toFixed(1), class: style, "text-anchor": anchor }, text);
const stroke = ([x1, y1, x2, y2], style) =>
  svg("line", { x1: x1.toFixed(1), y1: y1.toFixed(1), x2: x2.toFixed(1), y2: y2.toFixed(1), class: style });
