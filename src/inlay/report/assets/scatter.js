// Quality against one cost: points with deviation bars, the Pareto front, labels; a point selects its method.

const plotState = { cost: data.costs[0].name, quality: data.metric, close: false, log: new Map() };
for (const cost of data.costs) plotState.log.set(cost.name, cost.log);
const scatterFigure = byId("scatter");
let scatterTip = null;

const isLow = (name) => qualities.get(name).lower;
const onFront = (row) => data.fronts[plotState.quality][plotState.cost][row.index];
const plotted = () => finished.filter((row) =>
  row[plotState.cost] !== null && measured(row, plotState.quality).mean !== null);

// Quality beyond Tukey's fence on the bad side squeezes all others into a strip; a close-up leaves it at the edge.
function fence(values, low) {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (part) => {
    const i = part * (sorted.length - 1), under = Math.floor(i);
    return sorted[under] + (i - under) * ((sorted[under + 1] ?? sorted[under]) - sorted[under]);
  };
  const reach = 1.5 * (at(0.75) - at(0.25));
  return low ? at(0.75) + reach : at(0.25) - reach;
}
const beyond = (value, limit, low) => (low ? value > limit : value < limit);

function drawControls() {
  const box = byId("quality-controls");
  if (!finished.length) return;
  const rows = plotted(), low = isLow(plotState.quality);
  const means = rows.map((row) => measured(row, plotState.quality).mean);
  const far = means.length > 3 && means.some((mean) => beyond(mean, fence(means, low), low));
  const parts = [];
  if (data.qualities.length > 1) {
    parts.push(segmented("Quality on the vertical axis", data.qualities.map(({ name, title }) => [name, title]),
      plotState.quality, (name) => { plotState.quality = name; drawScatter(); drawControls(); }));
  }
  if (far) {
    parts.push(segmented("Range of the vertical axis", [["all", "all"], ["close", "close-up"]],
      plotState.close ? "close" : "all", (value) => { plotState.close = value === "close"; drawScatter(); }));
  }
  const scale = plotState.log.get(plotState.cost) ? "log" : "linear";
  parts.push(segmented("Scale of the cost", [["linear", "linear"], ["log", "log"]], scale,
    (value) => { plotState.log.set(plotState.cost, value === "log"); drawScatter(); }));
  box.replaceChildren(...parts);
}

function drawTabs() {
  const list = byId("cost-tabs");
  list.hidden = !finished.length;
  const choose = (name) => {
    plotState.cost = name;
    for (const tab of list.children) {
      const chosen = tab.dataset.cost === name;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
    }
    scatterFigure.setAttribute("aria-labelledby", `tab-${name}`);
    drawControls();
    drawScatter();
  };
  list.replaceChildren(...data.costs.map((cost) => el("button", { type: "button", role: "tab", id: `tab-${cost.name}`,
    "data-cost": cost.name, "aria-controls": "scatter", onclick: () => choose(cost.name) }, cost.label)));
  list.addEventListener("keydown", (event) => {
    const tabs = [...list.children], at = tabs.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const next = tabs[(to + tabs.length) % tabs.length];
    next.focus();
    choose(next.dataset.cost);
  });
  choose(plotState.cost);
}

function drawScatter() {
  const rows = plotted(), cost = costs.get(plotState.cost), quality = qualities.get(plotState.quality);
  if (!rows.length) {
    scatterFigure.replaceChildren(el("p", { class: "callout" }, finished.length
      ? `No method has both ${quality.title} and ${cost.label.toLowerCase()}.`
      : "No run finished, so there is nothing to plot."));
    return;
  }
  rows.sort((a, b) => a[cost.name] - b[cost.name]);
  const width = scatterFigure.clientWidth, narrow = width < 560;
  const height = Math.round(Math.min(Math.max(width * 0.6, 340), 500));
  const box = { left: 42, right: width - 14, top: 42, bottom: height - 50 };
  const low = isLow(quality.name), marks = rows.map((row) => measured(row, quality.name));
  const limit = plotState.close ? fence(marks.map((mark) => mark.mean), low) : low ? Infinity : -Infinity;
  const out = marks.map((mark) => beyond(mark.mean, limit, low));
  const spread = marks.map(({ mean, deviation }) => [mean - (deviation || 0), mean + (deviation || 0)]);
  const ends = spread.filter((_, i) => !out[i]).flat();
  const span = Math.max(...ends) - Math.min(...ends), pad = span * 0.08 || Math.abs(ends[0]) * 0.05 || 1;
  const up = axis({ low: Math.min(...ends) - pad, high: Math.max(...ends) + pad, start: box.bottom, end: box.top,
    unit: 1 / quality.factor, wanted: 6 });
  const log = plotState.log.get(cost.name);
  const across = costAxis(cost, rows.map((row) => row[cost.name]), box.left + 10, box.right, log, narrow ? 4 : 7);
  const edge = low ? box.top + 7 : box.bottom - 9;
  const points = rows.map((row, i) => [across.place(row[cost.name]), out[i] ? edge : up.place(marks[i].mean)]);
  const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": `${quality.title} against ${cost.label.toLowerCase()} of ${rows.length} methods` });
  drawAxes(picture, { cost, quality, across, up, box, width, height });
  const steps = drawFront(picture, points.filter((_, i) => onFront(rows[i])), box, low);
  const bars = points.map(([x], i) => (out[i] || spread[i][0] === spread[i][1] ? null
    : [x, up.place(spread[i][0]), x, up.place(spread[i][1])]));
  const texts = rows.map((row, i) => brief(row.method) + (out[i] ? ` ${low ? "↑" : "↓"} ${showQuality(quality.name, marks[i].mean)}` : ""));
  const sizes = texts.map((text, i) => [textWidth(text, onFront(rows[i]) ? 600 : 400) + 2, 15]);
  const labels = placeLabels(points, sizes, [box.left - 4, box.top - 14, width, box.bottom - 2], rows.map(onFront),
    [...bars.filter(Boolean), ...steps], 8, rows.map((row) => !narrow || onFront(row)));
  const layer = svg("g", { "aria-hidden": "true" });
  labels.forEach((label, i) => {
    if (!label) return;
    if (label.leader) layer.append(stroke(label.leader, "leader"));
    const x = [label.box[2], (label.box[0] + label.box[2]) / 2, label.box[0]][label.side + 1];
    const text = words(x, label.box[3] - 3.5, texts[i], `label ${onFront(rows[i]) ? "strong" : ""}`,
      ["end", "middle", "start"][label.side + 1]);
    text.dataset.method = rows[i].method;
    layer.append(text);
  });
  picture.append(layer);
  rows.forEach((row, i) => picture.append(point(row, points[i], bars[i], marks[i], cost, quality)));
  const kindsShown = [...kinds.keys()].filter((kind) => rows.some((row) => row.kind === kind));
  const key = el("figcaption", { class: "key" },
    kindsShown.map((kind) => el("span", {}, glyph(kind, 4.5), kind)),
    el("span", {}, svg("svg", { width: 22, height: 10, "aria-hidden": "true" }, stroke([0, 5, 22, 5], "front-line")),
      "Pareto front, its methods filled"),
    rows.some((row) => measured(row, quality.name).deviation !== null) ? el("span", {}, "bars: ± one deviation over seeds") : null);
  scatterFigure.replaceChildren(picture, key);
  scatterTip = tooltip(scatterFigure);
  markPoints();
}

function drawAxes(picture, { cost, quality, across, up, box, width, height }) {
  for (const tick of up.ticks()) {
    const y = up.place(tick);
    picture.append(stroke([box.left, y, box.right, y], "grid"),
      words(box.left - 8, y + 4, String(Number((tick * quality.factor).toPrecision(6))), "tick", "end"));
  }
  picture.append(stroke([box.left, box.bottom, box.right, box.bottom], "axis"));
  let free = -Infinity;
  for (const tick of across.ticks()) {
    const x = across.place(tick), text = showTick(cost, tick, across.high), half = textWidth(text, 400, 12) / 2;
    picture.append(stroke([x, box.bottom, x, box.bottom + 4], "axis"));
    if (x - half < free) continue;
    picture.append(words(Math.min(x, width - half), box.bottom + 19, text, "tick", "middle"));
    free = x + half + 6;
  }
  if (across.zero !== null) {
    const gap = (across.zero + across.start) / 2;
    for (const by of [-2, 2]) picture.append(stroke([gap + by - 2, box.bottom + 5, gap + by + 2, box.bottom - 5], "axis"));
  }
  const factor = quality.factor === 1 ? "" : ` ×${quality.factor}`;
  picture.append(words(2, 16, `${quality.title}${factor}`, "axis-title"));
  picture.append(words(2 + textWidth(`${quality.title}${factor}`, 600) + 8, 16,
    quality.lower ? "↓ lower is better" : "↑ higher is better", "tick"));
  picture.append(words(box.right, height - 8, `${cost.label.toLowerCase()}  ← less is better`, "tick", "end"));
}

// The border of what the methods on the front dominate, and that region shaded; gives the border as line segments.
function drawFront(picture, front, box, low) {
  if (!front.length) return [];
  const stairs = [];
  for (const point of front) {
    if (stairs.length) stairs.push([point[0], stairs.at(-1)[1]]);
    stairs.push(point);
  }
  stairs.push([box.right, stairs.at(-1)[1]]);
  const line = `M${stairs.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;
  const floor = low ? box.top : box.bottom;
  picture.append(svg("path", { class: "dominated", d: `${line}L${box.right} ${floor}L${stairs[0][0].toFixed(1)} ${floor}Z` }),
    svg("path", { class: "front-line", d: line }));
  return stairs.slice(1).map((point, i) => [...stairs[i], ...point]);
}

function point(row, [x, y], bar, mark, cost, quality) {
  const value = showSpread(quality.name, mark), price = show(cost.unit, row[cost.name]);
  const tell = () => {
    hover(row.method);
    scatterTip.show(x, y, row.method, [[quality.title, value], [cost.label, price],
      ["Seeds", String(row.n)], ...(onFront(row) ? [["On the Pareto front", "yes"]] : [])]);
  };
  const forget = () => { hover(null); scatterTip.hide(); };
  return svg("g", { class: `point ${kinds.get(row.kind).style} ${onFront(row) ? "on" : "off"}`, tabindex: 0,
    role: "button", "data-method": row.method, "aria-pressed": "false",
    "aria-label": `${row.method}: ${quality.title} ${value}, ${cost.label.toLowerCase()} ${price}`
      + (onFront(row) ? ", on the Pareto front" : ""),
    onclick: () => select(row.method), onmouseenter: tell, onmouseleave: forget, onfocus: tell, onblur: forget,
    onkeydown(event) {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      select(row.method);
    } },
  bar ? stroke(bar, "bar") : null,
  svg("circle", { class: "ring", cx: x.toFixed(1), cy: y.toFixed(1), r: 11 }),
  svg("path", { class: "mark", d: kinds.get(row.kind).path,
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)}) scale(5.5)` }));
}

function markPoints() {
  for (const node of scatterFigure.querySelectorAll("[data-method]")) {
    node.classList.toggle("selected", node.dataset.method === state.selected);
    node.classList.toggle("hovered", node.dataset.method === state.hovered);
    if (node.hasAttribute("aria-pressed")) node.setAttribute("aria-pressed", String(node.dataset.method === state.selected));
  }
}
