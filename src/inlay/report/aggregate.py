"""From runs to rows: mean and deviation over seeds, relative cost, and the Pareto fronts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from inlay.report.result import Cell, Result, number

Row = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """A price that a method has, and how a plot shows it."""

    label: str
    short: str
    unit: str  # "count", "bytes" or "seconds"
    log: bool  # whether its values lie decades apart, so that a plot starts with a logarithmic axis


COSTS = {
    "adapter_parameters": Cost("Adapter parameters", "Parameters", "count", True),
    "peak_memory_bytes": Cost("Peak training memory", "Memory", "bytes", False),
    "train_seconds": Cost("Training time", "Time", "seconds", False),
    "file_bytes": Cost("Adapter file", "File", "bytes", True),
    "saved_for_backward_bytes": Cost("Saved for backward", "Saved", "bytes", False),
}


def mean_of(values: Iterable[Any]) -> dict[str, Any]:
    """Mean, sample standard deviation (None below two values) and number of the finite values."""
    finite = [value for value in map(number, values) if value is not None]
    return {
        "mean": statistics.fmean(finite) if finite else None,
        "deviation": statistics.stdev(finite) if len(finite) > 1 else None,
        "n": len(finite),
    }


def cost_of(values: Iterable[Any]) -> float | None:
    """Mean of the finite values; an integer if all agree, as counts and file sizes do."""
    finite = [value for value in map(number, values) if value is not None]
    return finite[0] if len(set(finite)) == 1 else (statistics.fmean(finite) if finite else None)


def averaged(result: Result) -> list[str]:
    """The metrics that enter the average: those that point the same way as the primary one."""
    down = result.metric in result.lower_is_better
    return [name for name in result.metrics if (name in result.lower_is_better) == down]


def average(cell: Cell, names: Sequence[str]) -> float | None:
    """One run's average over metrics; None unless all were measured, as a partial average compares nothing."""
    values = [number(cell.metrics.get(name)) for name in names]
    return None if None in values else statistics.fmean(value for value in values if value is not None)


def relative_seconds(cells: Sequence[Cell], baseline: dict[int, Cell]) -> float | None:
    """Mean over the shared seeds of seconds / baseline's seconds, so that a slow seed is compared with itself."""
    ratios = []
    for cell in cells:
        paired = baseline.get(cell.seed)
        own, other = number(cell.train_seconds), number(paired.train_seconds) if paired else None
        if own is not None and other:
            ratios.append(own / other)
    return statistics.fmean(ratios) if ratios else None


def pareto(points: Sequence[tuple[float | None, float | None]], lower_is_better: bool = False) -> list[bool]:
    """For (quality, cost) points: is it on the front?

    A point is off if another is at least as good in both and better in one; equal points are on or off together. A
    point with a missing value is never on. Sorted by cost, a point is on the front if it is the best of its cost and
    better than all cheaper ones: O(n log n).
    """
    sign = -1 if lower_is_better else 1
    known = sorted((c, -sign * q, i) for i, (q, c) in enumerate(points) if q is not None and c is not None)
    front = [False] * len(points)
    best: tuple[float, float] | None = None  # (cost, -quality) of the last point that improved
    for cost, loss, index in known:
        if best is None or loss < best[1]:
            best = (cost, loss)
        front[index] = (cost, loss) == best
    return front


def quality(row: Row, name: str) -> dict[str, Any]:
    """A row's mean, deviation and n of a metric, or of "average"."""
    return row["average"] if name == "average" else row["metrics"][name]


def fronts(table: Sequence[Row], name: str, lower_is_better: bool) -> dict[str, list[bool]]:
    """Front membership of every row for one quality against each cost."""
    return {cost: pareto([(quality(row, name)["mean"], row[cost]) for row in table], lower_is_better) for cost in COSTS}


def finished_row(cells: Sequence[Cell], result: Result, baseline: dict[int, Cell]) -> Row:
    first, names = cells[0], averaged(result)
    costs = {cost: cost_of(getattr(cell, cost) for cell in cells) for cost in COSTS}
    base = cost_of(cell.base_parameters for cell in cells)
    adapter = costs["adapter_parameters"]
    return {
        "method": first.method,
        "kind": first.kind,
        "status": "finished",
        "seeds": sorted(cell.seed for cell in cells),
        "n": len(cells),
        "metrics": {name: mean_of(cell.metrics.get(name) for cell in cells) for name in result.metrics},
        "average": mean_of(average(cell, names) for cell in cells),
        **costs,
        "head_parameters": cost_of(cell.head_parameters for cell in cells),
        "base_parameters": base,
        "share_percent": 100 * adapter / base if adapter is not None and base else None,
        "train_seconds_deviation": mean_of(cell.train_seconds for cell in cells)["deviation"],
        "relative_seconds": relative_seconds(cells, baseline),
        "settings": {key: value for key, value in first.settings.items() if key != "seed"},
        "error": None,
    }


def failed_row(cells: Sequence[Cell], result: Result) -> Row:
    """Failed runs of one method for one reason: the columns of a finished row, without numbers."""
    nothing = {"mean": None, "deviation": None, "n": 0}
    row = finished_row(cells, result, {})
    empty = {key: None for key, value in row.items() if value is None or isinstance(value, int | float)}
    return row | empty | {
        "status": "failed",
        "n": 0,
        "metrics": dict.fromkeys(result.metrics, nothing),
        "average": nothing,
        "error": cells[0].error,
    }  # fmt: skip


def rows(result: Result) -> list[Row]:
    """One row per method in order of appearance, then one per method and reason of failure.

    A finished row holds `method`, `kind`, `status` ("finished" or "failed"), `seeds`, `n` (runs averaged), `metrics`
    ({name: {mean, deviation, n}}; the sample standard deviation, None for one seed), `average` (of the metrics that
    point the same way as the primary one), the costs of `COSTS`, `head_parameters`, `base_parameters`, `share_percent`
    (adapter / base, the head not counted), `train_seconds_deviation`, `relative_seconds` (to `result.baseline`, paired
    by seed), `settings`, `pareto` ({cost: bool} for the primary metric) and `error`. Failed rows have the same keys.
    Values that are missing or not finite are left out of means and their `n`. Raises ReportError for an empty result.
    """
    result.check()
    finished: dict[str, list[Cell]] = {}
    failed: dict[tuple[str, str], list[Cell]] = {}
    for cell in result.cells:
        if cell.error is None:
            finished.setdefault(cell.method, []).append(cell)
        else:
            failed.setdefault((cell.method, cell.error), []).append(cell)
    baseline = {cell.seed: cell for cell in finished.get(result.baseline or "", [])}
    table = [finished_row(cells, result, baseline) for cells in finished.values()]
    table += [failed_row(cells, result) for cells in failed.values()]
    membership = fronts(table, result.metric, result.metric in result.lower_is_better)
    for index, row in enumerate(table):
        row["pareto"] = {cost: front[index] for cost, front in membership.items()}
    return table
