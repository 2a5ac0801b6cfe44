"""Pages drawn from results: places, pairs beside a paper's, and what fits under a budget."""

from __future__ import annotations

import sys

from doc_blocks import ROOT

sys.path.insert(0, str(ROOT / "docs"))

from generator.papers import COLUMNS, Column
from generator.results import Task, budgets, committed, kinds, pairs, place

from inlay.report import Cell, Result
from inlay.report.aggregate import rows


def cell(method: str, kind: str, score: float, seed: int, **costs: int) -> Cell:
    cost = {"adapter_parameters": 10, "file_bytes": 10, "peak_memory_bytes": 10, "saved_for_backward_bytes": 10} | costs
    return Cell(
        method, kind, seed, {}, None, {"accuracy": score}, head_parameters=0, base_parameters=100, train_seconds=1.0,
        **cost,
    )  # fmt: skip


def task(scores: dict[str, tuple[float, float]], **costs: dict[str, int]) -> Task:
    cells = [
        cell(m, "baseline" if m == "Full" else "weight", s, seed, **costs.get(m, {}))
        for m, both in scores.items()
        for seed, s in enumerate(both)
    ]
    result = Result("t", "m", "d", "accuracy", ["accuracy"], cells)
    return Task("t", result, {row["method"]: row for row in rows(result)})


def test_equals_share_a_place():
    assert place({"a": 2.0, "b": 1.0, "c": 2.0}) == {"b": 1.0, "a": 2.5, "c": 2.5}


def test_only_pairs_that_noise_cannot_turn_are_named():
    found = task({"Full": (0.80, 0.82), "LoRA": (0.90, 0.91), "VeRA": (0.805, 0.835)})
    column = Column("a paper", "a setting", {"Full": 90.0, "LoRA": 89.0, "VeRA": 88.0})
    text = pairs(found, column, list(column.scores))
    assert text.startswith("1 of 3 pairs")  # only LoRA before VeRA
    assert "LoRA before Full." in text  # VeRA before Full is within the noise
    assert "VeRA before Full" not in text


def test_budgets_name_the_best_that_fit():
    costs = {"Full": {"saved_for_backward_bytes": 100}, "LoRA": {"saved_for_backward_bytes": 70}}
    found = task({"Full": (0.9, 0.9), "LoRA": (0.8, 0.8), "VeRA": (0.7, 0.7)}, **costs)
    kept = [line.split("|")[1:-1] for line in budgets([found]).splitlines() if "backward" in line]
    assert [line[2].strip() for line in kept] == ["1", "2"]  # at most 60 %: VeRA; at most 75 %: LoRA too
    assert kept[1][3].strip().startswith("LoRA")
    assert "| weight | 2 |" in kinds([found])


def test_every_method_of_a_papers_column_has_a_row():
    for found in committed():
        for column in COLUMNS.get(found.name, ()):
            assert set(column.scores) <= set(found.rows), column.setting
