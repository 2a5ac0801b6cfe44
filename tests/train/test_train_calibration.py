"""The trainer calibrates what starts from data by itself, once, on the batches that training begins with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import inlay
from inlay.core.checkpoint import read
from inlay.core.errors import OptionError
from inlay.recipe import Recipe
from inlay.train import loop, train
from inlay.train.progress import Silent

Make = Callable[..., Recipe]
METHODS = ["eva(r=3)", "corda(r=2)", "lorasb(r=3)", "dora(of=eva(r=2))"]


class Noted(Silent):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many batches each calibration was given."""
    counts: list[int] = []

    def counted(model, batches, loss, progress):
        batches = list(batches)
        counts.append(len(batches))
        return inlay.calibrate(model, batches, loss=loss, progress=progress)

    monkeypatch.setattr(loop, "calibrate", counted)
    return counts


@pytest.mark.parametrize("method", METHODS)
def test_trains_from_data(recipe: Make, calls: list[int], method: str) -> None:
    progress = Noted()
    done = train(recipe(method=method, calibration=4, steps=6), progress)
    assert calls == [4]
    assert any(text.startswith("calibrated ") for text in progress.said)
    assert all(int(t) for n, t in read(done.folder)[1].items() if n.endswith("samples"))
    assert train(recipe(method=method, calibration=4, steps=6)).metrics == done.metrics, "a finished run is read"
    assert calls == [4]


def test_other_methods_see_no_batch_before(recipe: Make, calls: list[int]) -> None:
    train(recipe(steps=2))
    assert calls == []


def test_the_batches_are_those_that_training_begins_with(recipe: Make, tmp_path: Path) -> None:
    """More of them, more samples; accumulated ones count one by one; the run repeats bit for bit."""
    seen = {}
    for name, fields in {"2": {"calibration": 2}, "3": {"calibration": 3, "accumulate": 2}, "6": {"calibration": 6},
                         "again": {"calibration": 6}}.items():  # fmt: skip
        done = train(recipe(method="eva(r=2, tau=1.0)", steps=2, output=str(tmp_path / name), **fields))
        seen[name] = read(done.folder)[1]
    samples = {name: int(next(t for n, t in found.items() if n.endswith("samples"))) for name, found in seen.items()}
    assert samples["2"] < samples["3"] < samples["6"] == samples["again"]
    assert all(torch.equal(t, seen["again"][n]) for n, t in seen["6"].items())


def test_a_resumed_run_does_not_calibrate_again(recipe: Make, calls: list[int], tmp_path: Path) -> None:
    class Stopped(Silent):
        def step(self, step: int, loss: float, rate: float) -> None:
            if step == 4:
                raise KeyboardInterrupt

    fields = {"method": "eva(r=3)", "where": ["attn.q", "mlp.down"], "steps": 6}
    whole = train(recipe(**fields, output=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        train(recipe(**fields, output=str(tmp_path / "cut")), Stopped())
    cut = train(recipe(**fields, output=str(tmp_path / "cut")))
    assert len(calls) == 2
    a, b = read(whole.folder)[1], read(cut.folder)[1]
    assert a.keys() == b.keys()
    assert all(torch.equal(t, b[n]) for n, t in a.items())
    assert len({t.shape[0] for n, t in a.items() if n.endswith(".A")}) > 1, "ranks should differ for this to show much"


def test_autocast_and_regression(recipe: Make, tmp_path: Path, tiny: Path) -> None:
    from tiny_task import make_data

    data = make_data(tmp_path / "scores", regression=True)
    for i, method in enumerate(METHODS[:3]):
        done = train(recipe(method=method, data=data, precision="autocast", steps=3, output=str(tmp_path / str(i))))
        assert all(t.isfinite().all() for t in read(done.folder)[1].values() if t.is_floating_point())


def test_the_field_is_checked(recipe: Make) -> None:
    with pytest.raises(OptionError, match="calibration"):
        recipe(method="eva", calibration=0)
