"""What the page shows, worked out here so that its script only draws."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from inlay.report.aggregate import COSTS, Row, averaged, fronts, rows
from inlay.report.numbers import cost, percent, ratio, scales, title
from inlay.report.palette import Mark
from inlay.report.result import Cell, Result, number
from inlay.report.text import qualities

Line = list[tuple[float, float]]
POINTS = 400  # of one curve; more cannot be seen and make the page slow
NEARLY = 0.01  # what "within 1 % of the best" means


def finite(value: Any) -> Any:
    """Plain data with None for NaN and infinities, which a browser's JSON lacks."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def series(cell: Cell, key: str) -> Line:
    """One run's curve of `key` as (step, value), in order of steps, without what is not a number."""
    found = {}
    for point in cell.curve:
        step, value = number(point.get("step")), number(point.get(key))
        if step is not None and value is not None:
            found[step] = value
    return sorted(found.items())


def at(line: Line, step: float) -> float:
    """A curve's value at a step within its range, on the straight line between its neighbours."""
    right = bisect.bisect_left(line, (step,))
    if line[right][0] == step:
        return line[right][1]
    (s0, v0), (s1, v1) = line[right - 1], line[right]
    return v0 + (v1 - v0) * (step - s0) / (s1 - s0)


def mean_curve(lines: Sequence[Line]) -> Line:
    """Mean over runs at every step that lies within all of them, so that no seed enters or leaves half-way.

    If no step does, the mean would be of nothing: then the longest run stands for all.
    """
    low, high = max(line[0][0] for line in lines), min(line[-1][0] for line in lines)
    steps = sorted({step for line in lines for step, _ in line if low <= step <= high})
    if not steps:
        return max(lines, key=len)
    return [(step, sum(at(line, step) for line in lines) / len(lines)) for step in steps]


def thin(line: Line) -> Line:
    """At most `POINTS` points, the first and the last among them."""
    if len(line) <= POINTS:
        return line
    return [line[round(index * (len(line) - 1) / (POINTS - 1))] for index in range(POINTS)]


def curves(result: Result) -> dict[str, dict[str, Any]]:
    """{key: {method: {"mean": line, "seeds": {seed: line}}}} of finished runs; loss first, then metrics."""
    done = [cell for cell in result.cells if cell.error is None and cell.curve]
    keys = {key: None for cell in done for point in cell.curve for key in point if key not in ("step", "epoch")}
    found: dict[str, dict[str, Any]] = {}
    for key in sorted(keys, key=lambda key: key != "loss"):
        for cell in done:
            if line := series(cell, key):
                found.setdefault(key, {}).setdefault(cell.method, {})[str(cell.seed)] = line
    return {
        key: {
            method: {
                "mean": thin(mean_curve(list(lines.values()))),
                "seeds": {seed: thin(line) for seed, line in lines.items()} if len(lines) > 1 else {},
            }
            for method, lines in methods.items()
        }
        for key, methods in found.items()
    }


def verdict(result: Result, table: Sequence[Row]) -> list[dict[str, str]]:
    """The best method, and the cheapest of those nearly as good, by parameters, time and memory."""
    down, shown = result.metric in result.lower_is_better, scales(result, table)[result.metric]
    known = [row for row in table if row["metrics"][result.metric]["mean"] is not None]
    if not known:
        return []
    value: Callable[[Row], float] = lambda row: row["metrics"][result.metric]["mean"]
    best = (min if down else max)(known, key=value)
    margin = abs(value(best)) * NEARLY
    near = [row for row in known if abs(value(row) - value(best)) <= margin]

    def said(row: Row) -> str:
        return f"{shown.spread(row['metrics'][result.metric])} {title(result.metric)}"

    def tile(heading: str, row: Row, figure: str, note: str) -> dict[str, str]:
        return {"heading": heading, "method": row["method"], "figure": figure, "note": note}

    share = percent(best["share_percent"])
    tiles = [
        tile(f"Best {title(result.metric)}", best, said(best).split(" ")[0], f"{said(best)}, {share} of the model")
    ]
    for name, heading in (
        ("adapter_parameters", "Smallest"),
        ("train_seconds", "Fastest"),
        ("peak_memory_bytes", "Least memory"),
    ):
        priced = [row for row in near if row[name] is not None]
        if len(near) > 1 and priced:
            row = min(priced, key=lambda row: row[name])
            figure = cost(name, row[name])
            if name == "train_seconds" and row["relative_seconds"] is not None:
                figure = ratio(row["relative_seconds"])
            tiles.append(tile(f"{heading} within 1 % of the best", row, figure, said(row)))
    return tiles


def first_selected(result: Result, table: Sequence[Row]) -> str:
    """The method whose settings the page shows at first: the best one that is not the baseline."""
    down = result.metric in result.lower_is_better
    known = [row for row in table if row["metrics"][result.metric]["mean"] is not None]
    known.sort(key=lambda row: row["metrics"][result.metric]["mean"], reverse=not down)
    others = [row for row in known if row["method"] != result.baseline]
    return str((others or known or table)[0]["method"])


def footnotes(result: Result, table: Sequence[Row]) -> list[str]:
    """How the numbers came about, in sentences, then the result's own notes."""
    some = [row for row in table if row["status"] == "finished"]
    notes = [*result.notes]
    notes.append(
        "Quality is measured on the test split; each number is the mean over seeds ± the sample standard deviation "
        "(n − 1). A method run with one seed has no deviation."
    )
    if any(scale.factor == 100 for scale in scales(result, table).values()):
        notes.append("Metrics that lie between −1 and 1 are shown ×100.")
    if len(averaged(result)) > 1:
        notes.append(f"The average is over {', '.join(title(name) for name in averaged(result))}, per seed.")
    notes.append(
        "Adapter parameters are those a method trains besides the task head, which is listed on its own and never "
        "added; the share is adapter parameters over those of the frozen model."
    )
    if any(row["relative_seconds"] is not None for row in some):
        notes.append(
            f"Time × full: seconds of each run over those of “{result.baseline}” with the same seed, then the mean."
        )
    elif result.baseline is not None:
        notes.append(f"No run of “{result.baseline}” shares a seed with another, so time is given in seconds.")
    notes.append("Bytes saved for backward are what autograd keeps between the forward and the backward pass.")
    notes.append(
        "A method is on a Pareto front if no other one is at least as good in both quality and cost and better in one; "
        "the deviation is not considered."
    )
    partial = [row["method"] for row in some if any(value["n"] < row["n"] for value in row["metrics"].values())]
    if partial:
        notes.append(f"Some seeds gave no number, and are left out of the mean: {', '.join(partial)}.")
    if any(row["status"] == "failed" for row in table):
        notes.append("Failed runs are listed with their reason and enter no mean.")
    return notes


def payload(result: Result, marks: dict[str, Mark]) -> dict[str, Any]:
    """All that the page's script draws, as JSON data."""
    table = rows(result)
    shown, names = scales(result, table), qualities(result)
    down = {name: (result.metric if name == "average" else name) in result.lower_is_better for name in names}
    methods = {cell.method for cell in result.cells}
    seeds = {cell.seed for cell in result.cells}
    tiles = verdict(result, table)
    lede = f"{plural(len(methods), 'method')}, {plural(len(seeds), 'seed')}, ranked by {title(result.metric)}"
    machine = {key: str(value) for key, value in result.machine.items() if value is not None}
    return finite({
        "title": result.title,
        "lede": lede,
        "facts": [["model", result.model], ["data", result.data], *machine.items()],
        "footer": "Made by inlay. This page is one file: it loads nothing and sends nothing.",
        "metric": result.metric,
        "selected": first_selected(result, table),
        "qualities": [
            {"name": name, "title": title(name), "lower": down[name], **dataclasses.asdict(shown[name])}
            for name in names
        ],
        "costs": [{"name": name, **dataclasses.asdict(value)} for name, value in COSTS.items()],
        "kinds": [{"name": kind, "path": mark.path} for kind, mark in marks.items()],
        "rows": [{**row, "index": index} for index, row in enumerate(table)],
        "fronts": {name: fronts(table, name, down[name]) for name in names},
        "cells": [
            {key: value for key, value in dataclasses.asdict(cell).items() if key not in ("curve", "settings")}
            for cell in result.cells
        ],
        "curves": curves(result),
        "verdict": tiles,
        "footnotes": footnotes(result, table),
        "recipe": result.recipe,
    })  # fmt: skip


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
