"""Checkpoints of a run: one safetensors file with tensors and, in its header, everything else. Never a pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inlay.core.calibrate import fit
from inlay.core.errors import InlayError
from inlay.core.files import atomic, canonical, tensors_digest
from inlay.core.options import options
from inlay.recipe import Recipe, Settings, as_dict

HARMLESS = ("output", "checkpoint_every", "keep_last", "tensorboard", "cache", "cache_limit")
"""Fields that may change between a run and its resumption: they do not touch what is trained."""


class TrainError(InlayError, RuntimeError):
    """A run that cannot begin, go on, or be resumed."""


@dataclass
class State:
    """Where a run stands between two steps. Order and dropout are functions of the seed and the step, so no more."""

    step: int = 0
    seconds: float = 0.0  # of training steps alone
    loss_sum: float = 0.0  # since the last point of the curve
    loss_count: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_step: int = 0
    since_best: int = 0
    stopped: bool = False
    peak_memory: int = 0  # of a GPU
    validation: dict[str, float] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run in `<output>/checkpoints`."""

    def __init__(self, folder: Path, own: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> None:
        self.folder, self.own, self.optimizer, self.keep = folder, own, optimizer, keep
        self.names = {id(p): name for name, p in own.named_parameters()}

    def save(self, state: State, best: dict[str, Tensor] | None) -> None:
        """Write a checkpoint whole or not at all, then drop the oldest ones beyond `keep`."""
        tensors = {f"adapter.{name}": t for name, t in snapshot(self.own).items()}
        for p, values in self.optimizer.state.items():
            tensors |= {f"optimizer.{self.names[id(p)]}:{key}": copied(t) for key, t in values.items()}
        tensors |= {f"best.{name}": t for name, t in (best or {}).items()}
        document = {"state": asdict(state), "digest": tensors_digest(tensors)}
        with atomic(self.folder / f"step-{state.step:08d}.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"inlay": canonical(document)})
        for old in self.files()[: -self.keep]:
            old.unlink()

    def files(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*.safetensors") if re.fullmatch(r"step-\d+", p.stem))

    def restore(self) -> tuple[State, dict[str, Tensor] | None]:
        """Put the newest readable checkpoint back; a fresh State when there is none."""
        for path in reversed(self.files()):
            try:
                state, tensors = read(path)
            except (SafetensorError, OSError, ValueError, KeyError):
                continue  # a damaged file costs its steps, not the run
            return state, self.put(tensors)
        return State(), None

    def put(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Into the adapter and the optimiser; returns the best adapter so far if there is one."""
        load_into(self.own, part(tensors, "adapter."))
        moments = part(tensors, "optimizer.")
        for name, p in self.own.named_parameters():
            # AdamW's step count stays on the CPU or the device as the optimiser made it: with `fused`, the device
            values = {k.rpartition(":")[2]: t for k, t in moments.items() if k.rpartition(":")[0] == name}
            if values:
                self.optimizer.state[p] = {key: t.to(p.device) for key, t in values.items()}
        return part(tensors, "best.") or None

    def clear(self) -> None:
        """Remove every checkpoint, and what a kill in the middle of a write left."""
        if self.folder.is_dir():
            for path in [*self.folder.glob("step-*"), *self.folder.glob(".step-*")]:
                path.unlink()
            self.folder.rmdir()

    def sweep(self) -> None:
        """Remove what a kill in the middle of a write left."""
        for path in self.folder.glob(".step-*"):
            path.unlink()


def read(path: Path) -> tuple[State, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        document = json.loads((file.metadata() or {})["inlay"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    if tensors_digest(tensors) != document["digest"]:
        raise ValueError("the tensors do not match their digest")
    return State(**document["state"]), tensors


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def copied(t: Tensor) -> Tensor:
    return t.detach().to("cpu", copy=True).contiguous()


def snapshot(own: nn.Module) -> dict[str, Tensor]:
    """Copies of an adapter's parameters and persistent buffers, as they are trained (not as they are shipped)."""
    return {name: copied(t) for name, t in own.state_dict().items()}


@torch.no_grad()
def load_into(own: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The reverse of `snapshot`; shapes and names must fit, but for those that a calibration chose."""
    fit(own, tensors)
    target = own.state_dict()
    if {n: t.shape for n, t in target.items()} != {n: t.shape for n, t in tensors.items()}:
        raise TrainError("the checkpoint holds other tensors than this recipe trains: was inlay updated meanwhile?")
    own.load_state_dict(tensors)  # not copies into its tensors: state that is no tensor goes through it too


# ---------------------------------------------------------------------- one folder, one recipe
def make(folder: Path) -> None:
    """Make an output folder unless it is there; TrainError where a file is in its place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise TrainError(f"the output {folder} cannot be a folder: a file is in its place") from None


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder, made if needed, for this process alone."""
    make(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TrainError(f"another process is training in {folder}: wait for it, or choose another output") from None
    try:
        yield
    finally:
        lock.release()


def claim(folder: Path, recipe: Settings, fingerprint: str) -> None:
    """Mark `folder` as this recipe's; TrainError naming the differences if it holds work of another one."""
    mark = folder / "run.json"
    wanted = {"recipe": as_dict(recipe), "data": fingerprint}
    kept = [p for name in ("checkpoints/step-*.safetensors", "adapter.safetensors", "result.json")
            for p in folder.glob(name)]  # fmt: skip
    if mark.exists() and kept:  # a run that failed before its first checkpoint leaves nothing to lose
        found = json.loads(mark.read_text(encoding="utf-8"))
        before, now = defaults() | found["recipe"], json.loads(canonical(wanted["recipe"]))
        changed = [k for k in {**before, **now} if k not in HARMLESS and before.get(k) != now.get(k)]
        if changed:
            told = "; ".join(f"{k}: {before.get(k)!r} there, {now.get(k)!r} here" for k in changed)
            raise TrainError(f"{folder} holds a run with another recipe ({told}). Choose another output, or delete it")
        if found["data"] != fingerprint:
            raise TrainError(f"{folder} holds a run on other data: the rows have changed since it began")
        return
    if (folder / "adapter.safetensors").exists():
        raise TrainError(f"{folder} holds an adapter that was not trained there: choose another output")
    write_json(mark, wanted)


def defaults() -> dict[str, Any]:
    """What fields were before a recipe had them."""
    return {name: field.default for name, field in options(Recipe).items() if field.default is not MISSING}


def write_json(path: Path, document: Any) -> None:
    """A JSON file, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
