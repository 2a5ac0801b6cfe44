"""The grid: every cell once, whatever happens; what failed says why; all files are there."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inlay.catalogue import names
from inlay.compare import compare, grid
from inlay.compare.pool import lost
from inlay.compare.show import line
from inlay.core.errors import OptionError
from inlay.core.method import method_from
from inlay.methods import DoRA, VeRA
from inlay.recipe import CompareRecipe, Recipe, as_dict, load_recipe
from inlay.report import read_json, rows
from inlay.train.groups import rates

Make = Callable[..., CompareRecipe]
THREE = ["lora(r=2)", "linearprobe", {"method": "bitfit", "label": "biases", "seeds": [7]}]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The cells that are really trained, in order."""
    calls: list[tuple[str, int]] = []
    original = grid.train

    def counting(recipe: Recipe, *args: Any) -> Any:
        calls.append((recipe.label(), recipe.seed))
        return original(recipe, *args)

    monkeypatch.setattr(grid, "train", counting)
    return calls


def test_every_cell_once_and_never_again(recipe: Make, trained: list, tmp_path: Path) -> None:
    first = compare(recipe(methods=["full", *THREE], seeds=[0, 1]))
    assert trained == [(m, 0) for m in ("Full", "LoRA(r=2)", "LinearProbe")] + [("BitFit", 7)] + [
        (m, 1) for m in ("Full", "LoRA(r=2)", "LinearProbe")
    ]
    table = {row["method"]: row for row in rows(first)}
    assert table["LoRA(r=2)"]["seeds"] == [0, 1]
    assert table["biases"]["n"] == 1
    assert table["Full"]["relative_seconds"] == 1.0
    assert table["LoRA(r=2)"]["adapter_parameters"] == 2 * 2 * (2 * 2 * 16)
    assert table["LinearProbe"]["adapter_parameters"] == 0
    assert table["LinearProbe"]["head_parameters"] == table["Full"]["head_parameters"] == 16 * 3 + 3
    assert table["Full"]["kind"] == table["LinearProbe"]["kind"] == "baseline"
    assert 0 < table["LinearProbe"]["saved_for_backward_bytes"] < table["LoRA(r=2)"]["saved_for_backward_bytes"]
    assert table["LoRA(r=2)"]["saved_for_backward_bytes"] < table["Full"]["saved_for_backward_bytes"]
    assert table["LoRA(r=2)"]["peak_memory_bytes"] < table["Full"]["peak_memory_bytes"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "cells", "runs", "report.html", "results.csv", "results.json", "table.md", "quality.svg",
    }  # fmt: skip
    trained.clear()
    second = compare(recipe(methods=["full", *THREE], seeds=[0, 1]))
    assert trained == []
    assert second.cells == first.cells
    assert read_json(tmp_path / "out" / "results.json") == second


def test_only_what_changed_is_trained(recipe: Make, trained: list) -> None:
    compare(recipe(methods=["lora(r=2)", "bitfit"]))
    trained.clear()
    compare(recipe(methods=["lora(r=2)", {"method": "bitfit", "learning_rate": 0.5}, "ia3"]))
    assert trained == [("BitFit", 0), ("IA3", 0)]
    trained.clear()
    compare(recipe(methods=[{"method": "lora(r=2)", "label": "another name"}], checkpoint_every=None))
    assert trained == []
    compare(recipe(methods=["lora(r=2)"], batch=4))
    assert trained == [("LoRA(r=2)", 0)]


def test_changed_data_are_trained_anew(recipe: Make, trained: list, tiny: Path, tmp_path: Path) -> None:
    import shutil

    mine = shutil.copytree(tiny / "data", tmp_path / "data")
    compare(recipe(methods=["bitfit"], data=str(mine)))
    with (mine / "train.csv").open("a") as file:
        file.write("the red cat,feline\n")
    trained.clear()
    compare(recipe(methods=["bitfit"], data=str(mine)))
    assert trained == [("BitFit", 0)]


def test_a_failed_cell_is_a_row_and_is_tried_again(recipe: Make, trained: list, tmp_path: Path) -> None:
    methods = ["bitfit", {"method": "lora", "where": ["nowhere"]}]
    result = compare(recipe(methods=methods))
    failed = next(row for row in rows(result) if row["status"] == "failed")
    assert failed["method"] == "LoRA"
    assert "'nowhere' matches nothing" in failed["error"]
    assert "nowhere" in (tmp_path / "out" / "table.md").read_text()
    trained.clear()
    compare(recipe(methods=methods))
    assert trained == [("LoRA", 0)]


def test_sharing_a_model_changes_no_cell(recipe: Make, tmp_path: Path) -> None:
    """Cells after others in one process equal cells on their own: nothing stays on the shared base."""
    together = compare(recipe(methods=["full", "lora(r=2)", "ia3", "bitfit"]))
    for cell in together.cells[1:]:
        method = cell.settings["method"]
        alone = compare(recipe(methods=[{"method": method}], output=str(tmp_path / cell.method)))
        assert alone.cells[0].metrics == cell.metrics
        assert [p["loss"] for p in alone.cells[0].curve] == [p["loss"] for p in cell.curve]


def test_all_stands_for_every_method_no_other_row_trains(recipe: Make) -> None:
    """And that can be trained without another one beside it."""
    labels = [row.label for row in recipe(methods=["lora(r=2)", "all", {"dora": {"of": "vera(r=4)"}}]).rows()]
    others = [method_from(name).label() for name in names() if name not in ("lora", "dora", "ist", "tfew")]
    assert labels == ["LoRA(r=2)", *others, "DoRA(of=VeRA(r=4))"]


def test_a_base_that_does_the_task_already_is_measured_as_it_is(recipe: Make, tmp_path: Path) -> None:
    limit = {"train": 4, "validation": 2, "test": 4}
    fields = {
        "model": "stories15m",
        "data": "gsm8k",
        "limit": limit,
        "max_length": 64,
        "steps": 1,
        "output": str(tmp_path / "lm"),
    }
    result = compare(recipe(methods=["lora(r=2)"], **fields))
    (said,) = [note for note in result.notes if note.startswith("The base without an adapter: loss ")]
    assert float(said.split()[6].rstrip(",")) > 1.0
    assert not any("without an adapter" in note for note in compare(recipe(methods=["lora(r=2)"])).notes)


def test_settings_say_what_the_methods_bring(recipe: Make) -> None:
    (task,) = grid.tasks(recipe(methods=[{"dora": {"of": "vera(r=4)"}}], learning_rate=None), "data")
    assert task.settings["learning_rate"] == {"DoRA": DoRA.learning_rate, "VeRA": VeRA.learning_rate}
    assert task.settings["method"]["of"]["r"] == 4
    assert task.settings["where"] == ["attn.q", "attn.v"]
    assert "seed" not in task.settings


def test_rates() -> None:
    base = {"model": "m", "data": "d"}
    assert rates(Recipe(**base, method="vera", learning_rate=0.5)) == (0.5, 0.5)
    assert rates(Recipe(**base, method="vera", rate_factor=0.5))[0] == VeRA.learning_rate * 0.5
    assert rates(Recipe(**base, method="vera", rate_factor=0.5, learning_rate=0.1))[0] == 0.1
    rate, head = rates(Recipe(**base, method="linearprobe"))
    assert rate == head
    assert rates(Recipe(**base, method="lora", head_learning_rate=0.1))[1] == 0.1


# ---------------------------------------------------------------------- kills
def test_killed_between_and_inside_cells(recipe: Make, trained: list, tmp_path: Path) -> None:
    made = recipe(methods=THREE)
    steps = 0

    def run() -> None:
        from inlay.compare import pool

        class Deadly(pool.Told):
            def step(self, number: int, loss: float, rate: float) -> None:
                nonlocal steps
                steps += 1
                if steps == 8:  # the second step of the second cell
                    os.kill(os.getpid(), signal.SIGKILL)

        pool.Told = Deadly  # type: ignore[misc]
        compare(made)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1
    trained.clear()
    compare(made)
    assert trained == [("LinearProbe", 0), ("BitFit", 7)]


SCRIPT = """
import json, sys
from inlay.compare import compare
from inlay.recipe import CompareRecipe, load_recipe
if __name__ == "__main__":
    compare(load_recipe(json.load(open(sys.argv[1])), CompareRecipe))
"""


def test_workers_and_their_end(recipe: Make, tmp_path: Path) -> None:
    """Two workers give what one process gives; when the comparison is killed they do not go on alone."""
    made = recipe(methods=["lora(r=2)", "ia3"], epochs=2, workers=2)
    result = compare(made)
    alone = compare(recipe(methods=["lora(r=2)", "ia3"], epochs=2, output=str(tmp_path / "alone")))
    assert [c.metrics for c in result.cells] == [c.metrics for c in alone.cells]
    long = recipe(methods=["lora(r=2)", "ia3"], epochs=100000, workers=2, output=str(tmp_path / "long"))
    (tmp_path / "recipe.json").write_text(json.dumps(as_dict(long)), encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(tmp_path / "recipe.json")])
    runs = tmp_path / "long" / "runs"
    wait(lambda: len(list(runs.glob("*/checkpoints/step-*"))) >= 2)
    process.kill()
    process.wait()
    time.sleep(1)
    wait(lambda: newest(runs) < time.time() - 3)


def newest(folder: Path) -> float:
    """When the last file below was written."""
    return max(p.stat().st_mtime for p in folder.rglob("*"))


def wait(condition: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_a_dead_worker_is_a_row_that_says_so(recipe: Make) -> None:
    tasks = grid.tasks(recipe(methods=["lora(r=2)", "ia3", "bitfit"]), "data")
    found = dict(lost(tasks, {1, 2}, {0: 11, 1: 12}, {12: -9}, all_dead=False))
    assert list(found) == [1]
    assert "ended with status -9: out of memory?" in (found[1].error or "")
    everything = dict(lost(tasks, {1, 2}, {0: 11, 1: 12}, {11: 1, 12: -9}, all_dead=True))
    assert "no worker was left" in (everything[2].error or "")


# ---------------------------------------------------------------------- recipes
def test_rows_with_settings_of_their_own(recipe: Make) -> None:
    made = recipe(
        methods=[
            "lora", {"method": "lora", "r": 4, "learning_rate": 0.5}, {"lora": {"r": 2}},
            {"method": ["lora", "bitfit"], "label": "both", "where": ["attn.q"]},
        ]
    )  # fmt: skip
    found = {row.label: row.recipe for row in made.rows()}
    assert list(found) == ["LoRA", "LoRA(r=4)", "LoRA(r=2)", "both"]
    assert found["LoRA(r=4)"].learning_rate == 0.5
    assert found["LoRA"].learning_rate == 0.01
    assert found["both"].where == ["attn.q"]
    assert load_recipe(as_dict(made), CompareRecipe) == made


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["lora", "lora"], "two rows are called 'LoRA'"),
        ([{"method": "lora", "data": "trec"}], "share their data"),
        ([{"method": "lora", "rr": 4}], "no option 'rr'"),
        ([{"method": "lora(r=2)", "labell": "x"}], "labell"),
        ([{"method": "vera", "seeds": [1, 1]}], "given twice"),
        ([{"method": "lora", "batch": 0}], "at least 1"),
        ([], "no methods"),
    ],
)
def test_wrong_rows(recipe: Make, methods: list, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        recipe(methods=methods)


def test_cells_above_frozen_blocks_compute_these_once_and_say_so(recipe: Make) -> None:
    top = {"method": "lora(r=2)", "layers": [1], "label": "top"}
    result = compare(recipe(methods=[top, "lora(r=2)", "linearprobe"], base_dropout=False, epochs=2))
    kept = {cell.method: cell.cache.get("kept") for cell in result.cells}
    blocks, head = "what leaves the lowest 1 of 2 blocks", "what enters 'classifier'"
    assert kept == {"top": blocks, "LoRA(r=2)": None, "LinearProbe": head}
    note = next(note for note in result.notes if note.startswith("Computed once"))
    assert note.endswith(f": {blocks} (top); {head} (LinearProbe).")
    assert f"{blocks} computed once" in line("top", result.cells[0])
    assert "once" not in line("LoRA(r=2)", result.cells[1])
