// The page: head, verdict, plots, table, notes; and what happens on selection.

function drawHead() {
  byId("title").textContent = data.title;
  byId("lede").textContent = data.lede;
  byId("facts").replaceChildren(...pairs(data.facts));
  byId("footer").textContent = data.footer;
}

function drawVerdict() {
  byId("verdict").replaceChildren(...data.verdict.map(({ heading, method, figure, note }) =>
    el("button", { type: "button", class: "tile", onclick: () => select(method) },
      el("span", { class: "tile-heading" }, heading),
      el("span", { class: "tile-figure" }, figure),
      el("span", { class: "tile-method" }, glyph(rowOf.get(method).kind, 4.5), method),
      el("span", { class: "tile-note" }, note))));
  byId("verdict").hidden = !data.verdict.length;
}

function drawNotes() {
  byId("notes").replaceChildren(...data.footnotes.map((note) => el("li", {}, note)));
  byId("recipe").replaceChildren(...pairs(flatten(data.recipe)));
  byId("recipe").parentElement.hidden = !Object.keys(data.recipe).length;
}

drawHead();
drawVerdict();
drawNotes();
drawTable();
drawTabs();
responsive(scatterFigure, drawScatter);
if (curveState.key === null) {
  byId("curves-section").hidden = true;
} else {
  drawCurveControls();
  drawLegend();
  responsive(curveFigure, drawCurves);
}

let detailed;
watch(() => {
  markPoints();
  markRows();
  if (curveState.key !== null) markCurves();
  if (detailed !== state.selected) drawDetails();
  detailed = state.selected;
});
select(data.selected);
