"""One table of several comparisons: a method per row, a task per column."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from inlay.report.aggregate import Row, rows
from inlay.report.numbers import MISSING, count, scales, size, title
from inlay.report.result import Result
from inlay.report.text import escape


def ranks(result: Result, table: Sequence[Row]) -> dict[str, float]:
    """The place of every method that has a mean of the primary metric, the best first; equals share theirs."""
    sign = 1 if result.metric in result.lower_is_better else -1
    means = {row["method"]: row["metrics"][result.metric]["mean"] for row in table}
    known = {method: sign * mean for method, mean in means.items() if mean is not None}
    order = sorted(known.values())
    first = {mean: order.index(mean) for mean in order}
    return {method: 1 + first[mean] + (order.count(mean) - 1) / 2 for method, mean in known.items()}


def order(results: Sequence[Result]) -> dict[str, float]:
    """The mean of every method's ranks over the tasks it ran on: near 0 for the best, near 1 for the last.

    Each rank is a share of that task's methods, so that a method few tasks admit is not favoured.
    """
    places = [ranks(result, rows(result)) for result in results]
    return {
        method: statistics.fmean((place[method] - 0.5) / len(place) for place in places if method in place)
        for method in dict.fromkeys(method for place in places for method in place)
    }


def across(results: Sequence[Result]) -> str:
    """Markdown: the primary metric of every method on every task, and what it costs on the first of them.

    Methods stand in their mean `order`. A missing number is a dash.
    """
    tables = [rows(result) for result in results]
    share = order(results)
    heads = [f"{result.data}, {result.model}: {title(result.metric)}" for result in results]
    out = [f"| Method | Rank | {' | '.join(map(escape, heads))} | Adapter | File | Peak memory | Saved for backward |"]
    out.append("|:--|" + "--:|" * (len(heads) + 5))
    for method in sorted(share, key=lambda name: share[name]):
        texts = [quality_text(result, table, method) for result, table in zip(results, tables, strict=True)]
        first = next((row for row in tables[0] if row["method"] == method), {})
        costs = [count(first.get("adapter_parameters"))]
        costs += [size(first.get(name)) for name in ("file_bytes", "peak_memory_bytes", "saved_for_backward_bytes")]
        out.append(f"| {escape(method)} | {share[method]:.0%} | {' | '.join([*texts, *costs])} |")
    return "\n".join([*out, ""])


def quality_text(result: Result, table: Sequence[Row], method: str) -> str:
    """Mean and deviation of the primary metric as the table of that comparison shows them, the best in bold."""
    shown = scales(result, table)[result.metric]
    means = {row["method"]: row["metrics"][result.metric] for row in table if row["status"] == "finished"}
    if method not in means or means[method]["mean"] is None:
        return MISSING
    best = (min if result.metric in result.lower_is_better else max)(
        value["mean"] for value in means.values() if value["mean"] is not None
    )
    text = shown.spread(means[method])
    return f"**{text}**" if means[method]["mean"] == best else text
