// What produced the selected row: its settings, and each seed's own result.

function flatten(settings, prefix = "") {
  return Object.entries(settings).flatMap(([key, value]) => {
    const name = prefix + key;
    if (value !== null && typeof value === "object" && !Array.isArray(value)) {
      return Object.keys(value).length ? flatten(value, `${name}.`) : [[name, "{}"]];
    }
    if (!Array.isArray(value)) return [[name, value === null ? "none" : String(value)]];
    const simple = value.every((item) => item === null || typeof item !== "object");
    return [[name, simple ? value.join(", ") || "[]" : JSON.stringify(value)]];
  });
}
// long names may break after a dot or an underscore
const breakable = (name) => name.split(/(?<=[._])/).flatMap((part) => [el("wbr"), part]).slice(1);
const pairs = (entries) => entries.map(([name, value]) => el("div", {}, el("dt", {}, breakable(name)), el("dd", {}, value)));

// Settings that all methods share tell nothing about one of them; they are folded away.
const everySetting = [...new Set(data.rows.map((row) => row.method))]
  .map((method) => new Map(flatten(data.rows.find((row) => row.method === method).settings)));
const shared = new Set(everySetting.length < 2 ? [] : [...everySetting[0]]
  .filter(([name, value]) => everySetting.every((settings) => settings.get(name) === value)).map(([name]) => name));

function runsTable(method) {
  const runs = data.cells.filter((cell) => cell.method === method).sort((a, b) => a.seed - b.seed);
  const names = data.qualities.map(({ name }) => name).filter((name) => name !== "average");
  const head = ["Seed", ...names.map((name) => qualities.get(name).title), "Time", "Memory"];
  return el("table", { class: "runs" },
    el("caption", {}, "Runs"),
    el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, runs.map((run) => (run.error !== null
      ? el("tr", { class: "failed" }, el("th", { scope: "row" }, String(run.seed)),
        el("td", { colspan: head.length - 1 }, `failed: ${reason(run)}`))
      : el("tr", {}, el("th", { scope: "row" }, String(run.seed)),
        names.map((name) => el("td", {}, showQuality(name, run.metrics[name]))),
        el("td", {}, show("seconds", run.train_seconds)), el("td", {}, show("bytes", run.peak_memory_bytes)))))));
}

function summary(row) {
  const ranked = finished.filter((other) => measured(other, data.metric).mean !== null)
    .sort((a, b) => (measured(b, data.metric).mean - measured(a, data.metric).mean) * (qualities.get(data.metric).lower ? -1 : 1));
  const rank = ranked.indexOf(row) + 1;
  const front = data.costs.filter(({ name }) => data.fronts[data.metric][name][row.index]).map(({ label }) => label.toLowerCase());
  return el("p", { class: "summary" },
    el("strong", {}, showSpread(data.metric, measured(row, data.metric))), ` ${qualities.get(data.metric).title}`,
    rank ? `, ${rank} of ${ranked.length}` : "",
    el("br"), front.length ? `On the Pareto front for ${front.join(", ")}.` : "On no Pareto front.");
}

function drawDetails() {
  const method = state.selected, row = rowOf.get(method) || data.rows.find((other) => other.method === method);
  const panel = byId("details");
  if (!row) {
    fill(panel, el("p", { class: "summary" }, "Select a point or a row to see what produced it."));
    return;
  }
  const settings = flatten(row.settings), common = settings.filter(([name]) => shared.has(name));
  const own = settings.filter(([name]) => !shared.has(name));
  fill(panel,
    el("p", { class: "eyebrow" }, glyph(row.kind, 4.5), row.kind),
    el("h3", {}, method),
    row.status === "finished" ? summary(row) : el("p", { class: "summary" }, "No run finished."),
    el("h4", {}, "Settings"),
    own.length ? el("dl", { class: "settings", id: "settings" }, pairs(own))
      : el("p", { class: "summary" }, "None of its own."),
    common.length ? el("details", {}, el("summary", {}, `The same for every method (${common.length})`),
      el("dl", { class: "settings" }, pairs(common))) : null,
    runsTable(method));
}
