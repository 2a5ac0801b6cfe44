"""What the committed results say: the order of methods beside that of papers, and which kind of method pays when."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from inlay.report import Result, read_json
from inlay.report.across import order
from inlay.report.aggregate import Row, rows
from inlay.report.numbers import count, percent, scales, size, title

from .markdown import linked, table
from .papers import COLUMNS, Column

RESULTS = Path(__file__).resolve().parent.parent.parent / "results" / "methods"
KINDS = ("weight", "hidden", "tokens", "input", "gradient", "schedule", "output")
COSTLY = {
    "saved_for_backward_bytes": "Kept for the backward pass",
    "peak_memory_bytes": "Peak memory of a step",
    "adapter_parameters": "Trained numbers",
}


@dataclass(frozen=True)
class Task:
    """One comparison with its finished rows by method."""

    name: str
    result: Result
    rows: dict[str, Row]

    @property
    def lower(self) -> bool:
        return self.result.metric in self.result.lower_is_better

    def mean(self, method: str) -> float:
        return self.rows[method]["metrics"][self.result.metric]["mean"]

    def error(self, method: str) -> float:
        """Standard error of the mean over seeds; 0 for one seed."""
        value = self.rows[method]["metrics"][self.result.metric]
        return (value["deviation"] or 0.0) / math.sqrt(value["n"])

    def shown(self, method: str) -> str:
        scale = scales(self.result, list(self.rows.values()))[self.result.metric]
        return scale.spread(self.rows[method]["metrics"][self.result.metric])

    def heading(self) -> str:
        return f"{self.result.data}, {self.result.model}: {title(self.result.metric)}"


def committed() -> list[Task]:
    """Every task that has results, in the order of `benchmarks/methods.py`."""
    found = []
    for name in ("trec", "stsb", "cifar10", "grocery", "instructlab"):
        path = RESULTS / name / "results.json"
        if path.exists():
            result = read_json(path)
            found.append(Task(name, result, {r["method"]: r for r in rows(result) if r["status"] == "finished"}))
    return found


# ---------------------------------------------------------------------- beside the papers
def orderings(tasks: Sequence[Task]) -> str:
    """Every paper's column beside our own order of the same methods."""
    return "\n".join(beside(task, column) for task in tasks for column in COLUMNS.get(task.name, ()))


def beside(task: Task, column: Column) -> str:
    """One table, and how many pairs stand in the same order."""
    both = [method for method in column.scores if method in task.rows]
    theirs = place({m: -column.scores[m] for m in both})
    sign = 1 if task.lower else -1
    ours = place({m: sign * task.mean(m) for m in both})
    lines = [
        [m, f"{column.scores[m]:g}", f"{theirs[m]:g}", task.shown(m), f"{ours[m]:g}"]
        for m in sorted(both, key=lambda m: (theirs[m], ours[m]))
    ]
    head = ["Method", column.setting, "place", task.heading(), "place"]
    caption = f"**{column.setting}** ({linked(column.source)}) beside {task.heading()}:"
    return f"{caption}\n\n{table(head, lines)}\n{pairs(task, column, both)}"


def place(values: dict[str, float]) -> dict[str, float]:
    """1 for the smallest; equals share the mean of their places."""
    known = sorted(values.values())
    return {m: known.index(v) + (known.count(v) + 1) / 2 for m, v in values.items()}


def pairs(task: Task, column: Column, methods: Sequence[str]) -> str:
    """A sentence on the pairs of methods that the paper tells apart."""
    same, turned = [], []
    for a, b in itertools.combinations(methods, 2):
        if column.scores[a] == column.scores[b]:
            continue
        better, worse = (a, b) if column.scores[a] > column.scores[b] else (b, a)
        ahead = task.mean(better) - task.mean(worse)
        (same if (ahead < 0) == task.lower and ahead else turned).append((better, worse, abs(ahead)))
    clear = [(b, w) for b, w, gap in turned if gap > 2 * math.hypot(task.error(b), task.error(w))]
    text = f"{len(same)} of {len(same) + len(turned)} pairs stand in the paper's order."
    if clear:
        named = ", ".join(f"{worse} before {better}" for better, worse in clear)
        text += f" Turned round by more than two standard errors of the difference: {named}."
    elif turned:
        text += " No pair is turned round by more than two standard errors of the difference."
    return text + "\n"


# ---------------------------------------------------------------------- which kind, when
def kinds(tasks: Sequence[Task]) -> str:
    """One row per kind of method: where its methods stand, and what they cost beside full fine-tuning."""
    standing, kind = order([t.result for t in tasks]), kind_of(tasks)
    lines = []
    for name in KINDS:
        methods = [m for m in standing if kind[m] == name]
        if not methods:
            continue
        best = min(methods, key=standing.__getitem__)
        lines.append([
            name, len(methods), f"{statistics.median(standing[m] for m in methods):.0%}",
            f"{best} ({standing[best]:.0%})",
            *(f"{statistics.median(beside_full(tasks, m, cost) for m in methods):.1%}" for cost in COSTLY),
        ])  # fmt: skip
    return table(["Kind", "Methods", "Median rank", "Best of them", *(f"{t} ÷ full" for t in COSTLY.values())], lines)


def kind_of(tasks: Sequence[Task]) -> dict[str, str]:
    return {method: row["kind"] for task in tasks for method, row in task.rows.items()}


def beside_full(tasks: Sequence[Task], method: str, cost: str) -> float:
    """A cost as a share of full fine-tuning's, the mean over the tasks that the method ran on."""
    shares = [t.rows[method][cost] / t.rows["Full"][cost] for t in tasks if method in t.rows and "Full" in t.rows]
    return statistics.fmean(shares)


def budgets(tasks: Sequence[Task]) -> str:
    """The methods of the best mean rank among those that stay under a share of what full fine-tuning costs."""
    standing, kind = order([t.result for t in tasks]), kind_of(tasks)
    tried = [m for m in standing if kind[m] != "baseline" and sum(m in t.rows for t in tasks) * 2 > len(tasks)]
    limits = {"adapter_parameters": (0.0005, 0.002, 0.01), "saved_for_backward_bytes": (0.6, 0.75),
              "peak_memory_bytes": (0.3, 0.4)}  # fmt: skip
    lines = []
    for cost, bounds in limits.items():
        for bound in bounds:
            fit = sorted((m for m in tried if beside_full(tasks, m, cost) <= bound), key=standing.__getitem__)
            names = ", ".join(f"{m} ({standing[m]:.0%})" for m in fit[:4]) or "none"
            lines.append([COSTLY[cost], f"at most {percent(100 * bound)}", len(fit), names])
    return table(["What is short", "beside full fine-tuning", "methods that fit", "best of them (mean rank)"], lines)


def leaders(tasks: Sequence[Task]) -> str:
    """Per task, the best of every kind with its cost."""
    parts = []
    for task in tasks:
        sign = 1 if task.lower else -1
        lines = []
        for name in ("baseline", *KINDS):
            here = sorted((m for m in task.rows if task.rows[m]["kind"] == name), key=lambda m: sign * task.mean(m))
            for method in here[: 2 if name in ("baseline", "weight", "hidden") else 1]:
                row = task.rows[method]
                costs = [count(row["adapter_parameters"]), size(row["file_bytes"])]
                costs += [size(row["peak_memory_bytes"]), size(row["saved_for_backward_bytes"])]
                lines.append([name, method, task.shown(method), *costs])
        head = ["Kind", "Best of it", title(task.result.metric), "Trained", "File", "Peak memory", "Kept for backward"]
        parts.append(f"**{task.heading()}**\n\n{table(head, lines)}")
    return "\n".join(parts)


SECTIONS: dict[str, dict[str, Callable[[Sequence[Task]], str]]] = {
    "orderings.md": {"orderings": orderings},
    "which.md": {"kinds": kinds, "budgets": budgets, "leaders": leaders},
}
