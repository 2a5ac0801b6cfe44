"""The static plot of quality against one cost, for a README: plain SVG that follows the reader's light or dark mode."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from inlay.core.errors import near
from inlay.report.aggregate import COSTS, Row, rows
from inlay.report.axes import Axis, cost_axis, quality_axis
from inlay.report.files import write_text
from inlay.report.labels import Segment, place, text_width
from inlay.report.numbers import Scale, cost, scales, tick, title
from inlay.report.palette import Mark, marks, stylesheet
from inlay.report.result import ReportError, Result

WIDTH, HEIGHT = 880, 510
LEFT, RIGHT, TOP, BOTTOM = 48, 860, 104, 412
FONT = 12.5
NOTHING = "No run finished, so there is nothing to plot."
STYLE = """
text{font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:#4b5563}
.title{font-size:17px;font-weight:650;fill:#111827}.strong{fill:#111827;font-weight:600}
.grid{stroke:#9ca3af;stroke-opacity:.28}.axis{stroke:#9ca3af;stroke-opacity:.9}
.front{fill:none;stroke:#6b7280;stroke-width:1.5;stroke-dasharray:none;stroke-opacity:.75}
.bar,.leader{stroke:currentColor;stroke-opacity:.55;stroke-width:1.25}.leader{stroke:#9ca3af;stroke-width:.8}
.mark{fill:currentColor;stroke:currentColor;vector-effect:non-scaling-stroke;stroke-width:1.5}.off{fill-opacity:.22}
@media (prefers-color-scheme:dark){text{fill:#a3adba}.title,.strong{fill:#f3f4f6}.front{stroke:#cbd5e1}}
"""


def write_svg(result: Result, path: str | os.PathLike[str], x: str = "adapter_parameters") -> Path:
    """Write the plot of the primary metric against cost `x`, one of `COSTS`, with the Pareto front.

    Deviations over seeds are bars; methods on the front are filled. Raises ReportError for an unknown cost or an
    empty result; if no run finished, the picture says so.
    """
    if x not in COSTS:
        raise ReportError(f"unknown cost '{x}'; known: {', '.join(COSTS)}{near(x, COSTS)}")
    table = [row for row in rows(result) if row["metrics"][result.metric]["mean"] is not None and row[x] is not None]
    subtitle = f"{result.model} on {result.data}"
    found = marks(row["kind"] for row in table)
    body = plot(result, table, x, found) if table else [text(LEFT, HEIGHT / 2, NOTHING)]
    described = f"{result.title}: {title(result.metric)} against {COSTS[x].label.lower()}, {subtitle}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label={quoteattr(described)}>',
        f"<title>{escape(described)}</title>",
        f"<style>{STYLE}{stylesheet(found, 'k')}</style>",
        text(LEFT, 28, result.title, "title"),
        text(LEFT, 49, subtitle),
        *body,
        "</svg>",
        "",
    ]
    return write_text(path, "\n".join(lines))


def text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(content)}</text>'


def line(segment: Segment, style: str) -> str:
    x1, y1, x2, y2 = segment
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def plot(result: Result, table: list[Row], x: str, found: dict[str, Mark]) -> list[str]:
    """Axes, front, points with bars and labels, and the legend."""
    measured = [row["metrics"][result.metric] for row in table]
    spread = [(m["mean"] - (m["deviation"] or 0), m["mean"] + (m["deviation"] or 0)) for m in measured]
    across = cost_axis(x, (row[x] for row in table), LEFT + 8, RIGHT)
    shown = scales(result, table)[result.metric]
    up = quality_axis((value for pair in spread for value in pair), BOTTOM, TOP, shown.factor)
    style = {kind: f"k{index}" for index, kind in enumerate(found)}
    points = [(across.place(row[x]), up.place(m["mean"])) for row, m in zip(table, measured, strict=True)]
    bars = [(px, up.place(low), px, up.place(high)) for (px, _), (low, high) in zip(points, spread, strict=True)]
    front = staircase([point for point, row in zip(points, table, strict=True) if row["pareto"][x]])
    out = axes(result, x, across, up, shown)
    if front:
        out.append(f'<path class="front" d="M{" L".join(f"{px:.1f} {py:.1f}" for px, py in front)}"/>')
    steps = [(*a, *b) for a, b in pairwise(front)]
    on_front = [row["pareto"][x] for row in table]
    sizes = [(text_width(row["method"], FONT), 15.0) for row in table]
    labels = place(points, sizes, (LEFT, TOP - 12, RIGHT + 18, BOTTOM - 2), on_front, [*bars, *steps])
    for row, (px, py), bar, label in zip(table, points, bars, labels, strict=True):
        on, kind = row["pareto"][x], row["kind"]
        value = shown.spread(row["metrics"][result.metric])
        spoken = f"{row['method']}: {title(result.metric)} {value}, {COSTS[x].label.lower()} {cost(x, row[x])}"
        out += [f'<g class="{style[kind]}"><title>{escape(spoken)}</title>', line(bar, "bar")]
        out.append(glyph(found[kind], px, py, "mark" if on else "mark off") + "</g>")
        if label:
            out += [line(label.leader, "leader")] if label.leader else []
            out.append(text(label.x, label.box[3] - 3.5, row["method"], "strong" if on else "", label.anchor))
    return out + legend(found)


def staircase(front: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The border of what the front dominates: along its quality until the next point, then to that one's."""
    path: list[tuple[float, float]] = []
    for px, py in sorted(front):
        path += [(px, path[-1][1]), (px, py)] if path else [(px, py)]
    return [*path, (RIGHT, path[-1][1])] if path else []


def axes(result: Result, x: str, across: Axis, up: Axis, shown: Scale) -> list[str]:
    out = []
    for value in up.ticks():
        y = up.place(value)
        out += [line((LEFT, y, RIGHT, y), "grid"), text(LEFT - 8, y + 4, f"{value * shown.factor:g}", anchor="end")]
    out.append(line((LEFT, BOTTOM, RIGHT, BOTTOM), "axis"))
    for value in across.ticks():
        px, words = across.place(value), tick(x, value, across.high)
        out += [line((px, BOTTOM, px, BOTTOM + 4), "axis"), text(px, BOTTOM + 19, words, anchor="middle")]
    if across.zero is not None:  # the axis is broken between zero and the logarithm
        gap = (across.zero + across.start) / 2
        out += [line((gap + shift - 2, BOTTOM + 5, gap + shift + 2, BOTTOM - 5), "axis") for shift in (-2, 2)]
    down = result.metric in result.lower_is_better
    factor = f" ×{shown.factor}" if shown.factor != 1 else ""
    scale = ", logarithmic" if across.log else ""
    out.append(text(LEFT, BOTTOM + 40, f"{COSTS[x].label}{scale}  ← less is better"))
    better = "↓ lower" if down else "↑ higher"
    return [*out, text(LEFT, TOP - 16, f"{title(result.metric)}{factor}  {better} is better")]


def glyph(mark: Mark, x: float, y: float, style: str) -> str:
    return f'<path class="{style}" transform="translate({x:.1f} {y:.1f}) scale(5)" d="{mark.path}"/>'


def legend(found: dict[str, Mark]) -> list[str]:
    out, px, y = [], float(LEFT + 6), HEIGHT - 18
    for index, (kind, mark) in enumerate(found.items()):
        out += [glyph(mark, px, y - 4, f"mark k{index}"), text(px + 11, y, kind)]
        px += text_width(kind, FONT) + 34
    return [*out, line((px, y - 4, px + 20, y - 4), "front"), text(px + 26, y, "Pareto front (filled points)")]
