// The table: one row per method, sortable, a small mark under each number; failed runs at the end say why.

const tableState = { column: `quality:${data.metric}`, down: !qualities.get(data.metric).lower };

const FRONT_LETTERS = [["adapter_parameters", "P", "adapter parameters"], ["peak_memory_bytes", "M", "peak memory"],
  ["train_seconds", "T", "training time"]];

// id, heading, value to sort by, text, small mark: "dot" with bar, "log" dot, "bar" from zero, or none
const tableColumns = [
  ...data.qualities.map(({ name, title }) => ({ id: `quality:${name}`, heading: title, mark: "dot",
    best: true, value: (row) => measured(row, name).mean, text: (row) => showSpread(name, measured(row, name)),
    spread: (row) => measured(row, name).deviation || 0, descending: !qualities.get(name).lower,
    short: (row) => measured(row, name).n < row.n ? `${measured(row, name).n} of ${row.n} seeds` : null })),
  { id: "adapter_parameters", heading: "Adapter parameters", mark: "log", unit: "count" },
  { id: "share_percent", heading: "Share of model", unit: "percent" },
  { id: "head_parameters", heading: "Head parameters", unit: "count" },
  { id: "file_bytes", heading: "File", mark: "log", unit: "bytes" },
  finished.some((row) => row.relative_seconds !== null)
    ? { id: "relative_seconds", heading: "Time ×full", mark: "bar", unit: "ratio" }
    : { id: "train_seconds", heading: "Time", mark: "bar", unit: "seconds" },
  { id: "peak_memory_bytes", heading: "Peak memory", mark: "bar", unit: "bytes" },
  { id: "saved_for_backward_bytes", heading: "Saved for backward", mark: "bar", unit: "bytes" },
  { id: "n", heading: "Seeds", text: (row) => String(row.n) },
].map((column) => ({ value: (row) => row[column.id], text: (row) => show(column.unit, row[column.id]),
  descending: false, ...column }));

function ranges() {
  for (const column of tableColumns) {
    const known = finished.map(column.value).filter((value) => value !== null);
    const positive = known.filter((value) => value > 0);
    if (column.mark === "log") {
      const low = Math.log(Math.min(...positive)), high = Math.log(Math.max(...positive));
      column.part = (value) => (value > 0 && high > low ? (Math.log(value) - low) / (high - low) : 0);
    } else if (column.mark === "bar") {
      const high = Math.max(...known);
      column.part = (value) => (high > 0 ? value / high : 0);
    } else if (column.mark === "dot" && known.length) {
      // an outlier on the bad side sits at the edge, so that the others can be told apart
      const limit = known.length > 3 ? fence(known, !column.descending) : column.descending ? -Infinity : Infinity;
      column.out = (value) => beyond(value, limit, !column.descending);
      const ends = finished.filter((row) => column.value(row) !== null && !column.out(column.value(row)))
        .flatMap((row) => [column.value(row) - column.spread(row), column.value(row) + column.spread(row)]);
      const low = Math.min(...ends), high = Math.max(...ends);
      column.part = (value) => (high > low ? Math.min(Math.max((value - low) / (high - low), 0), 1) : 0.5);
      column.top = (column.descending ? Math.max : Math.min)(...known);
    }
  }
}

function strip(column, row) {
  const value = column.value(row);
  const track = el("span", { class: `strip ${column.mark} ${kinds.get(row.kind).style}`, "aria-hidden": "true" });
  if (value === null) return track;
  const out = column.mark === "dot" && column.out(value);
  if (column.mark === "dot" && !out) {
    const bar = el("i", { class: "whisker" });
    bar.style.left = `${100 * column.part(value - column.spread(row))}%`;
    bar.style.right = `${100 - 100 * column.part(value + column.spread(row))}%`;
    track.append(bar);
  }
  const mark = el("i", { class: column.mark === "bar" ? "fill" : out ? "spot out" : "spot" });
  mark.style[column.mark === "bar" ? "width" : "left"] = `${100 * column.part(value)}%`;
  track.append(mark);
  return track;
}

function frontCell(row) {
  const memberships = data.fronts[data.metric];
  const names = FRONT_LETTERS.filter(([cost]) => memberships[cost][row.index]).map(([, , name]) => name);
  return el("td", { class: "fronts" },
    el("span", { class: "unseen" }, names.length ? `on the front for ${names.join(", ")}` : "on no front"),
    FRONT_LETTERS.map(([cost, letter, name]) => el("span", { "aria-hidden": "true", title: name,
      class: memberships[cost][row.index] ? "yes" : "no" }, memberships[cost][row.index] ? letter : "·")));
}

function methodCell(row) {
  return el("th", { scope: "row" }, el("button", { type: "button", class: "method", "data-method": row.method,
    "aria-pressed": "false" }, glyph(row.kind, 4.5), el("span", {}, row.method)));
}

function bodyRow(row) {
  const behave = { "data-method": row.method, onclick: () => select(row.method),
    onmouseenter: () => hover(row.method), onmouseleave: () => hover(null) };
  if (row.status === "failed") {
    return el("tr", { ...behave, class: "failed" }, methodCell(row), el("td", { colspan: tableColumns.length + 1 },
      el("strong", {}, "failed"), ` (${inSeeds(row.seeds)}): ${reason(row)}`));
  }
  return el("tr", behave, methodCell(row), tableColumns.map((column) => {
    const best = column.best && column.value(row) !== null && column.value(row) === column.top;
    const missing = column.short ? column.short(row) : null;
    return el("td", { class: best ? "best" : null }, el("span", { class: "value" }, column.text(row)),
      missing ? el("small", {}, missing) : null, column.mark ? strip(column, row) : null);
  }), frontCell(row));
}

function sorted() {
  if (tableState.column === "method") {
    return [...finished].sort((a, b) => a.method.localeCompare(b.method) * (tableState.down ? -1 : 1));
  }
  const column = tableColumns.find(({ id }) => id === tableState.column);
  const known = finished.filter((row) => column.value(row) !== null);
  known.sort((a, b) => (column.value(a) - column.value(b)) * (tableState.down ? -1 : 1));
  return [...known, ...finished.filter((row) => column.value(row) === null)];
}

function heading(id, text, descending) {
  const chosen = tableState.column === id;
  return el("th", { scope: "col", class: id === "method" ? "first" : null,
    "aria-sort": chosen ? (tableState.down ? "descending" : "ascending") : "none" },
  el("button", { type: "button", "data-column": id, onclick() {
    const down = tableState.column === id ? !tableState.down : descending;
    Object.assign(tableState, { column: id, down });
    drawTable();
    byId("methods").querySelector(`button[data-column="${CSS.escape(id)}"]`).focus();
  } }, text));
}

function drawTable() {
  ranges();
  const head = el("tr", {}, heading("method", "Method", false),
    tableColumns.map(({ id, heading: text, descending }) => heading(id, text, descending)),
    el("th", { scope: "col", class: "plain" }, "Front"));
  const table = el("table", { id: "results" },
    el("caption", { class: "unseen" }, "Methods with quality, size and cost; the headings sort"),
    el("thead", {}, head), el("tbody", {}, sorted().map(bodyRow), failures.map(bodyRow)));
  byId("methods").replaceChildren(table);
  byId("table-hint").textContent = `Mean ± sample deviation over seeds. Dots: place between the lowest and the highest value
    of the column, hollow if far off (parameters and file on a logarithmic scale); bars start at zero. Front: on the Pareto front of
    ${qualities.get(data.metric).title} against P parameters, M memory, T time.`.replace(/\s+/g, " ");
  markRows();
}

function markRows() {
  for (const row of byId("methods").querySelectorAll("tr[data-method]")) {
    const chosen = row.dataset.method === state.selected;
    row.classList.toggle("selected", chosen);
    row.classList.toggle("hovered", row.dataset.method === state.hovered);
    row.querySelector("button.method").setAttribute("aria-pressed", String(chosen));
  }
}
