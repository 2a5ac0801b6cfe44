"""Rows from runs: values worked out by hand, and the Pareto front against its definition."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_result import comparison

from inlay.report import COSTS, Cell, ReportError, Result, pareto, rows


def cell(method: str = "A", seed: int = 0, **changes) -> Cell:
    usual = {
        "kind": "weight", "settings": {"r": 8}, "error": None, "metrics": {"accuracy": 0.9, "f1": 0.8},
        "adapter_parameters": 200, "head_parameters": 30, "base_parameters": 10_000, "file_bytes": 1_000,
        "train_seconds": 10.0, "peak_memory_bytes": 4_000, "saved_for_backward_bytes": 500, "curve": [],
    }  # fmt: skip
    return Cell(method=method, seed=seed, **(usual | changes))


def result(cells: list[Cell], **changes) -> Result:
    usual = {"title": "T", "model": "M", "data": "D", "metric": "accuracy", "metrics": ["accuracy", "f1"]}
    return Result(cells=cells, **(usual | changes))


def test_means_and_sample_deviations_by_hand():
    scores = [(0.90, 0.80), (0.92, 0.86), (0.97, 0.83)]
    runs = [cell(seed=seed, metrics={"accuracy": a, "f1": f}) for seed, (a, f) in enumerate(scores)]
    (row,) = rows(result(runs))
    assert row["n"] == 3
    assert row["seeds"] == [0, 1, 2]
    assert row["metrics"]["accuracy"]["mean"] == pytest.approx(0.93)
    assert row["metrics"]["accuracy"]["deviation"] == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    assert row["metrics"]["f1"]["mean"] == pytest.approx(0.83)
    assert row["metrics"]["f1"]["deviation"] == pytest.approx(0.03)
    # averages per seed are .85, .89, .90: their deviation is not a mean of the metrics' deviations
    assert row["average"]["mean"] == pytest.approx(0.88)
    assert row["average"]["deviation"] == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.02**2) / 2))
    assert row["share_percent"] == pytest.approx(2.0)
    assert (row["adapter_parameters"], row["head_parameters"], row["file_bytes"]) == (200, 30, 1_000)
    assert isinstance(row["adapter_parameters"], int)


def test_one_seed_has_no_deviation():
    (row,) = rows(result([cell()]))
    assert row["metrics"]["accuracy"] == {"mean": 0.9, "deviation": None, "n": 1}
    assert row["average"]["deviation"] is None
    assert row["train_seconds_deviation"] is None


def test_relative_seconds_are_paired_by_seed():
    full = [cell("Full", seed, train_seconds=seconds) for seed, seconds in ((0, 10.0), (1, 40.0))]
    lora = [cell("LoRA", seed, train_seconds=seconds) for seed, seconds in ((0, 5.0), (1, 10.0), (2, 999.0))]
    other = [cell("Other", 7)]
    table = rows(result([*full, *lora, *other], baseline="Full"))
    assert [row["relative_seconds"] for row in table] == [1.0, pytest.approx((0.5 + 0.25) / 2), None]
    assert all(row["relative_seconds"] is None for row in rows(result([*full, *lora])))


def test_what_was_not_measured_is_left_out_and_counted():
    runs = [
        cell(seed=0, metrics={"accuracy": 0.8, "f1": 0.7}, peak_memory_bytes=None),
        cell(seed=1, metrics={"accuracy": math.nan, "f1": 0.9}, peak_memory_bytes=None),
        cell(seed=2, metrics={"accuracy": 0.6}, peak_memory_bytes=None),
    ]
    (row,) = rows(result(runs))
    assert row["metrics"]["accuracy"]["mean"] == pytest.approx(0.7)
    assert row["metrics"]["accuracy"]["n"] == 2
    assert row["metrics"]["f1"] == {"mean": pytest.approx(0.8), "deviation": pytest.approx(math.sqrt(0.02)), "n": 2}
    assert row["average"] == {"mean": pytest.approx(0.75), "deviation": None, "n": 1}  # only seed 0 has both
    assert row["peak_memory_bytes"] is None
    assert not row["pareto"]["peak_memory_bytes"]
    assert row["pareto"]["adapter_parameters"]


def test_the_average_leaves_out_metrics_of_the_other_direction():
    runs = [cell(metrics={"accuracy": 0.8, "f1": 0.6, "loss": 9.0})]
    (row,) = rows(result(runs, metrics=["accuracy", "f1", "loss"], lower_is_better=["loss"]))
    assert row["average"]["mean"] == pytest.approx(0.7)


def test_failed_runs_are_rows_that_say_why():
    runs = [cell("A", 0), cell("A", 1, error="NaN"), cell("B", 0, error="memory"), cell("B", 1, error="memory")]
    table = rows(result(runs))
    assert [(row["method"], row["status"], row["seeds"], row["error"]) for row in table] == [
        ("A", "finished", [0], None),
        ("A", "failed", [1], "NaN"),
        ("B", "failed", [0, 1], "memory"),
    ]
    assert table[0]["metrics"]["accuracy"]["n"] == 1
    assert set(table[0]) == set(table[1])
    assert table[2]["adapter_parameters"] is None
    assert not any(table[2]["pareto"].values())


def test_lower_is_better_turns_the_front_around():
    runs = [cell("small", adapter_parameters=1, metrics={"loss": 2.0}), cell("big", metrics={"loss": 3.0})]
    lower = rows(result(runs, metric="loss", metrics=["loss"], lower_is_better=["loss"]))
    higher = rows(result(runs, metric="loss", metrics=["loss"]))
    assert [row["pareto"]["adapter_parameters"] for row in lower] == [True, False]
    assert [row["pareto"]["adapter_parameters"] for row in higher] == [True, True]


values = st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(-10, 10)


@given(points=st.lists(st.tuples(values, values), max_size=30), lower=st.booleans())
def test_pareto_front_is_what_its_definition_says(points, lower):
    def better(a, b):
        return a < b if lower else a > b

    def dominated(q, c):
        known = [(a, b) for a, b in points if a is not None and b is not None]
        return any(not better(q, a) and b <= c and (better(a, q) or b < c) for a, b in known)

    expected = [q is not None and c is not None and not dominated(q, c) for q, c in points]
    assert pareto(points, lower) == expected


def test_an_empty_result_is_refused():
    with pytest.raises(ReportError, match="no runs"):
        rows(result([]))


def test_runs_that_are_no_rows_of_one_table_are_refused():
    with pytest.raises(ReportError, match="differ in lr, r"):
        rows(result([cell(seed=0, settings={"r": 8, "lr": 1}), cell(seed=1, settings={"r": 4})]))
    with pytest.raises(ReportError, match="occurs twice"):
        rows(result([cell(), cell()]))
    with pytest.raises(ReportError, match="one kind"):
        rows(result([cell(seed=0), cell(seed=1, kind="hidden")]))
    (row,) = rows(result([cell(seed=seed, settings={"r": 8, "seed": seed}) for seed in (0, 1)]))
    assert row["settings"] == {"r": 8}


def test_an_unknown_metric_names_near_ones():
    with pytest.raises(ReportError, match="did you mean 'accuracy'"):
        result([cell()], metric="acuracy")
    with pytest.raises(ReportError, match="unknown metric 'loss'"):
        result([cell()], lower_is_better=["loss"])


def test_what_is_no_plain_data_is_refused_by_name():
    with pytest.raises(ReportError, match=r"run 'A', seed 0: settings\.of\.fn is a function"):
        cell(settings={"of": {"fn": lambda: None}})


def test_all_costs_are_in_every_row():
    for row in rows(comparison()):
        assert set(row["pareto"]) == set(COSTS)
        assert set(COSTS) <= set(row)
    assert set(COSTS) <= {field.name for field in dataclasses.fields(Cell)}
