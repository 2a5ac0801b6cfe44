// Learning curves: per method the mean over seeds, and each seed as a thin line; the legend switches them on and off.

const DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2", "1 4", "14 3 3 3"];
const curveState = { key: Object.keys(data.curves)[0] || null, log: false, hidden: new Set() };
const curveFigure = byId("curves");
const curveMethods = finished.filter((row) => Object.values(data.curves).some((curves) => curves[row.method]));
const dashOf = new Map(curveMethods.map((row) => {
  const same = curveMethods.filter((other) => other.kind === row.kind);
  return [row.method, DASHES[same.indexOf(row) % DASHES.length]];
}));

const curveTitle = (key) => (qualities.has(key) ? qualities.get(key).title : key.replaceAll("_", " "));
const curveFactor = (key) => (qualities.has(key) ? qualities.get(key).factor : 1);
const shownCurves = () => curveMethods.filter((row) => data.curves[curveState.key][row.method] && !curveState.hidden.has(row.method));
const linesOf = (row) => data.curves[curveState.key][row.method];
const allPositive = () => Object.values(data.curves[curveState.key])
  .every(({ mean, seeds }) => [mean, ...Object.values(seeds)].flat().every(([, value]) => value > 0));

function drawCurveControls() {
  const parts = [];
  const keys = Object.keys(data.curves);
  if (keys.length > 1) {
    parts.push(segmented("Curve", keys.map((key) => [key, curveTitle(key)]), curveState.key,
      (key) => { curveState.key = key; curveState.log = curveState.log && allPositive(); drawCurveControls(); drawCurves(); }));
  }
  const scale = segmented("Scale of the curves", [["linear", "linear"], ["log", "log"]], curveState.log ? "log" : "linear",
    (value) => { curveState.log = value === "log"; drawCurves(); });
  if (!allPositive()) scale.querySelector("[data-value=log]").disabled = true;
  byId("curve-controls").replaceChildren(...parts, scale);
}

function drawLegend() {
  const setAll = (visible) => {
    curveState.hidden = new Set(curveMethods.filter((row) => !visible(row)).map((row) => row.method));
    for (const chip of byId("curve-legend").querySelectorAll("[data-method]")) {
      chip.setAttribute("aria-pressed", String(!curveState.hidden.has(chip.dataset.method)));
    }
    drawCurves();
  };
  const onAnyFront = (row) => Object.values(data.fronts[data.metric]).some((front) => front[row.index]);
  byId("curve-legend").replaceChildren(
    el("button", { type: "button", class: "plain", onclick: () => setAll(() => true) }, "all"),
    el("button", { type: "button", class: "plain", onclick: () => setAll(() => false) }, "none"),
    el("button", { type: "button", class: "plain", onclick: () => setAll(onAnyFront) }, "on a Pareto front"),
    ...curveMethods.map((row) => el("button", { type: "button", class: "chip", "data-method": row.method, "aria-pressed": "true",
      onclick(event) {
        const hidden = curveState.hidden;
        if (!hidden.delete(row.method)) hidden.add(row.method);
        event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(row.method)));
        drawCurves();
      },
      onmouseenter: () => hover(row.method), onmouseleave: () => hover(null) },
    svg("svg", { width: 24, height: 8, class: kinds.get(row.kind).style, "aria-hidden": "true" },
      svg("line", { x1: 0, x2: 24, y1: 4, y2: 4, class: "curve", "stroke-dasharray": dashOf.get(row.method) })),
    row.method)));
}

// Push labels apart, as little as possible, from top to bottom and back.
function spreadLabels(labels, top, bottom) {
  labels.sort((a, b) => a.y - b.y);
  let free = top;
  for (const label of labels) { label.at = Math.max(label.y, free); free = label.at + 15; }
  let limit = bottom;
  for (const label of [...labels].reverse()) { label.at = Math.min(label.at, limit); limit = label.at - 15; }
  return labels;
}

function drawCurves() {
  const rows = shownCurves(), key = curveState.key, factor = curveFactor(key);
  const width = curveFigure.clientWidth, height = Math.round(Math.min(Math.max(width * 0.42, 300), 420));
  if (!rows.length) {
    curveFigure.replaceChildren(el("p", { class: "callout" }, "No curve is switched on; choose some below."));
    return;
  }
  const roomy = width >= 640;
  const names = rows.map((row) => textWidth(brief(row.method), 600));
  const box = { left: 46, right: width - (roomy ? Math.min(Math.max(...names), 210) + 22 : 12), top: 36, bottom: height - 42 };
  const everything = rows.flatMap((row) => [linesOf(row).mean, ...Object.values(linesOf(row).seeds)]).flat();
  const steps = everything.map(([step]) => step), values = everything.map(([, value]) => value);
  const [first, last] = [steps.reduce((a, b) => Math.min(a, b)), steps.reduce((a, b) => Math.max(a, b))];
  const [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const pad = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
  const up = curveState.log ? axis({ low: low / 1.1, high: high * 1.1, start: box.bottom, end: box.top, log: true })
    : axis({ low: low >= 0 && low - pad < 0 ? 0 : low - pad, high: high + pad, start: box.bottom, end: box.top,
      unit: 1 / factor, wanted: 5 });
  const across = axis({ low: Math.min(first, last - 1), high: last, start: box.left, end: box.right, wanted: roomy ? 8 : 4 });
  const path = (line) => `M${line.map(([s, v]) => `${across.place(s).toFixed(1)} ${up.place(v).toFixed(1)}`).join("L")}`;
  const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${curveTitle(key)} during training of ${rows.length} methods` });
  for (const tick of up.ticks()) {
    const y = up.place(tick);
    picture.append(stroke([box.left, y, box.right, y], "grid"),
      words(box.left - 8, y + 4, String(Number((tick * factor).toPrecision(3))), "tick", "end"));
  }
  picture.append(stroke([box.left, box.bottom, box.right, box.bottom], "axis"));
  for (const tick of across.ticks()) {
    picture.append(stroke([across.place(tick), box.bottom, across.place(tick), box.bottom + 4], "axis"),
      words(across.place(tick), box.bottom + 19, show("count", tick).replace(".0", ""), "tick", "middle"));
  }
  const unit = factor === 1 ? "" : ` ×${factor}`;
  picture.append(words(2, 16, curveTitle(key) + unit, "axis-title"), words(box.right, height - 6, "step", "tick", "end"));
  if (curveState.log) picture.append(words(2 + textWidth(curveTitle(key) + unit, 600) + 8, 16, "logarithmic", "tick"));
  for (const row of rows) {
    const { mean, seeds } = linesOf(row), style = kinds.get(row.kind).style;
    picture.append(svg("g", { class: `run ${style}`, "data-method": row.method },
      Object.values(seeds).map((line) => svg("path", { class: "seed", d: path(line) })),
      svg("path", { class: "curve", d: path(mean), "stroke-dasharray": dashOf.get(row.method) })));
  }
  if (roomy) {
    const labels = rows.map((row) => ({ row, y: up.place(linesOf(row).mean.at(-1)[1]), x: across.place(linesOf(row).mean.at(-1)[0]) }));
    for (const { row, y, x, at } of spreadLabels(labels, box.top + 2, box.bottom - 2)) {
      picture.append(svg("g", { class: `end ${kinds.get(row.kind).style}`, "data-method": row.method },
        svg("path", { class: "lead", d: `M${(x + 2).toFixed(1)} ${y.toFixed(1)}L${box.right + 14} ${at.toFixed(1)}` }),
        words(box.right + 18, at + 4, brief(row.method), "label")));
    }
  }
  curveFigure.replaceChildren(picture);
  const tip = tooltip(curveFigure);
  picture.addEventListener("pointermove", (event) => {
    const frame = picture.getBoundingClientRect(), px = event.clientX - frame.left, py = event.clientY - frame.top;
    let near = { distance: 22 };
    for (const row of rows) {
      for (const [step, value] of linesOf(row).mean) {
        const distance = Math.hypot(across.place(step) - px, up.place(value) - py);
        if (distance < near.distance) near = { distance, row, step, value };
      }
    }
    hover(near.row ? near.row.method : null);
    if (!near.row) { tip.hide(); return; }
    tip.show(across.place(near.step), up.place(near.value), near.row.method,
      [["step", String(near.step)], [curveTitle(key), String(Number((near.value * factor).toPrecision(4)))]]);
  });
  picture.addEventListener("pointerleave", () => { hover(null); tip.hide(); });
  picture.addEventListener("click", () => { if (state.hovered) select(state.hovered); });
  markCurves();
}

function markCurves() {
  const emphasised = [state.hovered, state.selected];
  for (const node of curveFigure.querySelectorAll("[data-method]")) {
    node.classList.toggle("strong", emphasised.includes(node.dataset.method));
  }
  for (const chip of byId("curve-legend").querySelectorAll("[data-method]")) {
    chip.classList.toggle("selected", chip.dataset.method === state.selected);
  }
}
