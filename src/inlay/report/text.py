"""The table for a terminal and for Markdown; both from one description of the columns."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from inlay.report.aggregate import Row, averaged, quality, rows
from inlay.report.numbers import MISSING, Scale, count, percent, ratio, scales, seconds, size, title
from inlay.report.result import Result

FRONTS = {"adapter_parameters": "P", "peak_memory_bytes": "M", "train_seconds": "T"}
NAME = 28  # characters of the longest method's name in a terminal; longer ones fold
LEGEND = "Pareto front of {metric} against P parameters, M memory, T time; mean ± sample deviation over seeds"


@dataclass(frozen=True)
class Column:
    """A heading, a row's text under it, and how soon it gives way on a narrow terminal (0: never)."""

    heading: str
    show: Callable[[Row], str]
    yields: int = 0


def qualities(result: Result) -> list[str]:
    """The metrics, then their average if it says anything more."""
    return [*result.metrics, *(["average"] if len(averaged(result)) > 1 else [])]


def seeds(row: Row) -> str:
    """How many seeds; `2 of 3` if some gave no number."""
    counted = min((value["n"] for value in row["metrics"].values()), default=row["n"])
    return str(row["n"]) if counted == row["n"] else f"{counted} of {row['n']}"


def on_front(row: Row) -> str:
    return " ".join(letter if row["pareto"][cost] else "·" for cost, letter in FRONTS.items())


def quality_column(name: str, shown: Scale, yields: int) -> Column:
    return Column(title(name), lambda row: shown.spread(quality(row, name)), yields)


def columns(result: Result, table: list[Row]) -> list[Column]:
    """The columns after the method's name."""
    shown = scales(result, table)
    time = Column("Time", lambda row: seconds(row["train_seconds"]))
    if any(row["relative_seconds"] is not None for row in table):
        time = Column("Time ×full", lambda row: ratio(row["relative_seconds"]))
    return [
        Column("Seeds", seeds, 6),
        *(
            quality_column(name, shown[name], {result.metric: 0, "average": 2}.get(name, 1))
            for name in qualities(result)
        ),
        Column("Adapter", lambda row: count(row["adapter_parameters"])),
        Column("Share", lambda row: percent(row["share_percent"]), 5),
        Column("Head", lambda row: count(row["head_parameters"]), 7),
        Column("File", lambda row: size(row["file_bytes"]), 8),
        time,
        Column("Peak memory", lambda row: size(row["peak_memory_bytes"]), 4),
        Column("Saved for backward", lambda row: size(row["saved_for_backward_bytes"]), 9),
        Column("Front", on_front, 3),
    ]


def failure(row: Row) -> str:
    """One line that says which seeds failed and why."""
    word = "seed" if len(row["seeds"]) == 1 else "seeds"
    reason = " ".join((row["error"] or "").split()) or "no reason given"
    return f"failed ({word} {', '.join(map(str, row['seeds']))}): {reason}"


def best(result: Result, table: list[Row]) -> dict[str, str]:
    """Per quality, the text of its best mean, to be set in bold."""
    shown, found = scales(result, table), {}
    for name in qualities(result):
        means = [quality(row, name) for row in table if quality(row, name)["mean"] is not None]
        down = (result.metric if name == "average" else name) in result.lower_is_better
        if means:
            found[title(name)] = shown[name].show((min if down else max)(value["mean"] for value in means))
    return found


def width_of(column: Column, finished: list[Row]) -> int:
    words = [*column.heading.split(), *(column.show(row) for row in finished)]  # headings wrap, numbers do not
    return max(6, *map(cell_len, words))


def table(result: Result, width: int | None = None) -> Table:
    """The table for a terminal of `width` characters; without it, every column.

    On a narrow terminal the least telling columns give way first, so that no number is ever cut. Failed runs are
    rows too; why they failed is said below the table.
    """
    lines = rows(result)
    finished = [row for row in lines if row["status"] == "finished"]
    kept = columns(result, lines)
    name_width = max(min(cell_len(row["method"]), NAME) for row in lines)
    while width and name_width + 4 + sum(width_of(column, finished) + 3 for column in kept) > width:
        droppable = [column for column in kept if column.yields]
        if not droppable:
            break
        kept.remove(max(droppable, key=lambda column: column.yields))
    drawn = Table(
        title=Text(f"{result.title}: {result.model} on {result.data}", "bold"), title_justify="left", box=SIMPLE_HEAD
    )
    drawn.add_column("Method", overflow="fold", width=name_width)
    for column in kept:
        heading = column.heading.replace(" ", "\n")
        drawn.add_column(heading, justify="right", no_wrap=True, width=width_of(column, finished))
    strongest = best(result, lines)
    for row in finished:
        cells = [(column.heading, column.show(row)) for column in kept]
        bold = [text.split(" ±")[0] == strongest.get(heading) for heading, text in cells]
        texts = (Text(text, "bold" if strong else "") for (_, text), strong in zip(cells, bold, strict=True))
        drawn.add_row(Text(row["method"]), *texts)
    caption = Text(LEGEND.format(metric=title(result.metric)))
    for row in lines:
        if row["status"] == "failed":
            first = next(index for index, column in enumerate(kept) if not column.yields)
            words = ["failed" if index == first else MISSING for index in range(len(kept))]
            drawn.add_row(Text(row["method"]), *words, style="red")
            caption.append(f"\n{row['method']} {failure(row)}", "red")
    drawn.caption, drawn.caption_justify = caption, "left"
    return drawn


def escape(text: str) -> str:
    """Text that Markdown shows as it is: no cell borders, tags, links or emphasis."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")


def markdown(result: Result) -> str:
    """The table in GitHub's Markdown, the best mean of each metric in bold, failed runs as rows that say why."""
    lines = rows(result)
    shown, strongest = columns(result, lines), best(result, lines)
    out = ["| Method | " + " | ".join(escape(column.heading) for column in shown) + " |"]
    out.append("|:--|" + "--:|" * len(shown))
    for row in lines:
        if row["status"] == "failed":
            out.append(f"| {escape(row['method'])} | {escape(failure(row))} |" + " |" * (len(shown) - 1))
            continue
        cells = [(column.heading, column.show(row)) for column in shown]
        texts = [f"**{text}**" if text.split(" ±")[0] == strongest.get(heading) else text for heading, text in cells]
        out.append(f"| {escape(row['method'])} | {' | '.join(texts)} |")
    return "\n".join([*out, "", LEGEND.format(metric=escape(title(result.metric))) + f"; {MISSING} not measured.", ""])
