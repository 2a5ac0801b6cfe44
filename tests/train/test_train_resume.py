"""A run killed at any moment and started again ends with the same adapter, bit for bit."""

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
import torch
from tiny_task import recipe_for

from inlay.core.checkpoint import read
from inlay.core.errors import InlayError
from inlay.recipe import Recipe
from inlay.train import TrainError, state, train
from inlay.train.progress import Silent

Make = Callable[..., Recipe]


class KilledAt(Silent):
    """Kills its process after a step, as SIGKILL from outside would."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: int, loss: float, rate: float) -> None:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return read(folder)[1]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def in_child(run: Callable[[], Any]) -> int:
    """The exit code of `run` in a forked process; negative: the signal that ended it."""
    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def die_in(name: str, after: int) -> Callable[..., Any]:
    """A replacement for a function of `inlay.train.state` that kills the process halfway through call `after`."""
    original, calls = getattr(state, name), [0]

    def replacement(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == after:
            if name == "save_file":  # half a file
                Path(args[1]).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    return replacement


METHODS = ["lora(r=2, dropout=0.1)", "full", ["lora(r=2)", "bitfit"], "adalora(r=4, target=2)", "dylora(frozen=true)",
           "relora(restarts=2, warmup=3)", "deltalora", "deltalora(of=eva(r=3))", ["galore(r=2, every=3)", "bitfit"],
           ["lora(r=2, dropout=0.1)", "bitfit", "ist(every=3, share=0.5)"]]  # fmt: skip
NAMES = ["lora", "full", "two", "adalora", "dylora", "relora", "deltalora", "eva", "galore", "ist"]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_killed_after_steps(recipe: Make, tmp_path: Path, method: Any) -> None:
    """Kills before the first checkpoint, just after one, between two, and again and again; base dropout is on."""
    undisturbed = recipe(method=method, output=str(tmp_path / "a"))
    train(undisturbed)
    disturbed = recipe(method=method, output=str(tmp_path / "b"))
    for at in (1, 2, 5, 8, 11):
        assert in_child(lambda at=at: train(disturbed, KilledAt(at))) == -signal.SIGKILL
    done = train(disturbed)
    assert done.steps == 12
    assert equal(tensors(str(tmp_path / "a")), tensors(str(tmp_path / "b")))
    first, second = (json.loads((tmp_path / d / "result.json").read_text()) for d in "ab")
    for key in ("metrics", "validation", "curve", "steps", "best_step"):
        assert first[key] == second[key], key


def test_killed_with_steps_within_the_backward_pass(recipe: Make, tmp_path: Path) -> None:
    fields = {"method": "galore(r=2, every=3, per_layer=true)", "clip": None}
    train(recipe(**fields, output=str(tmp_path / "a")))
    disturbed = recipe(**fields, output=str(tmp_path / "b"))
    assert in_child(lambda: train(disturbed, KilledAt(5))) == -signal.SIGKILL
    train(disturbed)
    assert equal(tensors(str(tmp_path / "a")), tensors(str(tmp_path / "b")))


@pytest.mark.parametrize(
    ("function", "call"),
    [("save_file", 1), ("save_file", 3), ("atomic", 2), ("write_json", 1)],
    ids=["half-a-first-checkpoint", "half-a-later-checkpoint", "before-a-checkpoint", "before-the-mark"],
)
def test_killed_while_saving(recipe: Make, tmp_path: Path, function: str, call: int) -> None:
    """Patience is on, so that the best adapter is in the checkpoints as well."""
    fields = {"patience": 5, "evaluate_every": 1}
    train(recipe(**fields, output=str(tmp_path / "a")))
    disturbed = recipe(**fields, output=str(tmp_path / "b"))

    def run() -> None:
        setattr(state, function, die_in(function, call))
        train(disturbed)

    assert in_child(run) == -signal.SIGKILL
    train(disturbed)
    assert equal(tensors(str(tmp_path / "a")), tensors(str(tmp_path / "b")))
    assert not (tmp_path / "b" / "checkpoints").exists(), "nothing is left over"


@pytest.mark.parametrize("moment", ["adapter", "result"])
def test_killed_while_finishing(recipe: Make, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills between the last step and the end: before the adapter is written, and before the result is."""
    from inlay.core.adapter import Adapter
    from inlay.train import loop

    train(recipe(output=str(tmp_path / "a")))
    disturbed = recipe(output=str(tmp_path / "b"))

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        if moment == "adapter":
            Adapter.save = die  # type: ignore[method-assign]
        else:
            loop.write_json = die  # type: ignore[assignment]
        train(disturbed)

    assert in_child(run) == -signal.SIGKILL
    train(disturbed)
    assert equal(tensors(str(tmp_path / "a")), tensors(str(tmp_path / "b")))


def test_killed_from_outside(tiny: Path, recipe: Make, tmp_path: Path) -> None:
    """A separate process, killed when its first checkpoint appears; then run to its end in another one."""
    fields = {"epochs": 10, "output": str(tmp_path / "b")}
    document = tmp_path / "recipe.json"
    document.write_text(json.dumps(recipe_for(tiny, **fields)), encoding="utf-8")
    script = [sys.executable, str(Path(__file__).with_name("tiny_task.py")), str(document)]
    process = subprocess.Popen(script, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("b/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    train(recipe(**fields))
    train(recipe(epochs=10, output=str(tmp_path / "a")))
    assert equal(tensors(str(tmp_path / "a")), tensors(str(tmp_path / "b")))


def test_a_finished_run_is_not_trained_again(recipe: Make) -> None:
    first = train(recipe())
    before = (first.folder / "adapter.safetensors").stat().st_mtime_ns
    second = train(recipe())
    assert (first.folder / "adapter.safetensors").stat().st_mtime_ns == before
    assert second.metrics == first.metrics
    assert second.seconds == first.seconds
    assert second.adapter.adapter_parameters == first.adapter.adapter_parameters


def test_a_changed_recipe_is_refused(recipe: Make) -> None:
    train(recipe(steps=2))
    with pytest.raises(TrainError, match=r"batch: 8 there, 4 here.*another output"):
        train(recipe(steps=2, batch=4))
    train(recipe(steps=2, keep_last=3, checkpoint_every=None))  # harmless: does not touch what is trained


def test_changed_data_are_refused(recipe: Make, tiny: Path, tmp_path: Path) -> None:
    import shutil

    mine = shutil.copytree(tiny / "data", tmp_path / "data")
    train(recipe(steps=2, data=str(mine)))
    with (mine / "train.csv").open("a") as file:
        file.write("the red cat,feline\n")
    with pytest.raises(TrainError, match="rows have changed"):
        train(recipe(steps=2, data=str(mine)))


def test_a_foreign_adapter_is_not_overwritten(recipe: Make, tmp_path: Path) -> None:
    train(recipe(steps=2))
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(TrainError, match="not trained there"):
        train(recipe(steps=2))


def test_two_processes_cannot_share_a_folder(recipe: Make, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(TrainError, match="another process"):
        train(recipe())


def test_a_damaged_checkpoint_costs_its_steps_alone(recipe: Make, tmp_path: Path) -> None:
    train(recipe(output=str(tmp_path / "a")))
    again = recipe(output=str(tmp_path / "b"), keep_last=2)
    assert in_child(lambda: train(again, KilledAt(7))) == -signal.SIGKILL
    older, newer = sorted((tmp_path / "b" / "checkpoints").glob("step-*"))
    assert [older.name, newer.name] == ["step-00000004.safetensors", "step-00000006.safetensors"]
    content = bytearray(newer.read_bytes())
    content[-5] ^= 1
    newer.write_bytes(content)
    train(again)
    assert equal(tensors(str(tmp_path / "a")), tensors(str(tmp_path / "b")))


def test_checkpoint_files_hold_no_pickle(recipe: Make, tmp_path: Path) -> None:
    again = recipe()
    assert in_child(lambda: train(again, KilledAt(3))) == -signal.SIGKILL
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ""}
    assert not any(b"\x80\x02" in p.read_bytes()[:2] for p in files)


# ---------------------------------------------------------------------- what runs out
def limit_files(size: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk(recipe: Make, tmp_path: Path) -> None:
    """Files may not grow beyond what the first checkpoint needs; the error is clear, the run goes on afterwards."""
    undisturbed = recipe(output=str(tmp_path / "a"))
    train(undisturbed)
    disturbed = recipe(output=str(tmp_path / "b"))
    assert in_child(lambda: train(disturbed, KilledAt(5))) == -signal.SIGKILL
    kept = [p.name for p in (tmp_path / "b" / "checkpoints").glob("step-*")]
    assert kept == ["step-00000004.safetensors"]

    def run() -> None:
        limit_files(2000)
        with pytest.raises(InlayError, match="full"):
            train(disturbed)

    assert in_child(run) == 0
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == kept, "intact, and no half file beside it"
    train(disturbed)
    assert equal(tensors(str(tmp_path / "a")), tensors(str(tmp_path / "b")))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate"
        ),
    ],
    ids=["gpu", "python", "cpu"],
)
def test_out_of_memory(recipe: Make, tmp_path: Path, error: Exception) -> None:
    class Greedy(Silent):
        def step(self, step: int, loss: float, rate: float) -> None:
            if step == 5:
                raise error

    with pytest.raises(TrainError, match=r"out of memory with batches of 8 rows; the checkpoint of step 4 is intact"):
        train(recipe(), Greedy())
    train(recipe(output=str(tmp_path / "a")))
    train(recipe())
    assert equal(tensors(str(tmp_path / "a")), tensors(str(tmp_path / "out")))


def test_really_out_of_memory(recipe: Make) -> None:
    """The allocator's own words: a batch that no machine holds."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    from inlay.train.shortage import out_of_memory

    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("shapes do not match"))


def test_the_model_is_free_after_a_failure(recipe: Make) -> None:
    """A failed run leaves nothing attached, so the model can be used for the next."""
    from inlay.work import Shared

    class Failing(Silent):
        def step(self, step: int, loss: float, rate: float) -> None:
            raise ValueError("broken")

    shared = Shared()
    with pytest.raises(ValueError, match="broken"):
        train(recipe(), Failing(), shared)
    train(recipe(), shared=shared)
