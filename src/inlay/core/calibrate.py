"""One pass over data for every method that starts from it.

The network runs as it is without what is being calibrated, in evaluation mode, and `inlay.core.watch` looks on. What
the methods make of it is put in place all together or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.active import attached
from inlay.core.container import Inlay
from inlay.core.errors import AdapterError, CalibrationError
from inlay.core.levels import Level
from inlay.core.method import Method
from inlay.core.modes import evaluating
from inlay.core.sharded import is_sharded
from inlay.core.statistics import Calibrated, starts_from_data
from inlay.core.watch import Loss, Watch, plain_arithmetic


@dataclass(frozen=True)
class Calibration:
    """What a calibration did; printed, one line."""

    places: int
    batches: int
    samples: int
    """Input vectors of the place that saw the most; batches where gradients alone were wanted."""
    seconds: float

    def __str__(self) -> str:
        return f"calibrated {self.places} places on {self.batches} batches in {self.seconds:.1f} s"


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Calibration:
    """Let the active methods that start from data (EVA, CorDA, LoRA-SB, SCT) see some: one pass for all of them.

    Call it after `inlay.adapt`, before the first training step and before DistributedDataParallel or FSDP2 wrap the
    model; in several processes with the same batches in each. Trained tensors keep their identity, so an optimizer made
    before still holds them. Doing it again begins anew. The result depends on the batches alone: no random numbers.

    Args:
        model: a model with adapters.
        batches: what the model is called with, on its device: mappings of keyword arguments, tuples of positional
            ones, or single tensors. Taken one after the other until no method needs more.
        loss: (output, batch) ↦ scalar for methods that want gradients; by default the output's own `loss`, as
            transformers' models give when the batch has labels.
        progress: called after each batch with how many are done and how many there are, None where that is not known.

    Raises:
        CalibrationError: nothing to calibrate, no batch, no loss, statistics that are not finite or too few vectors
        for a rank.  AdapterError: adapters are merged, or tensors spread over processes. Nothing is changed then.
    """
    inlay, started = attached(model), time.perf_counter()
    methods = wanting(inlay)
    if inlay.state.merged_names:
        raise AdapterError(f"{list(inlay.state.merged_names)} are merged into the base: unmerge before calibrating")
    if any(is_sharded(p) for p in model.parameters()):
        raise AdapterError("the model is spread over processes already: calibrate first, then call fully_shard")
    if isinstance(batches, Mapping | Tensor):
        raise CalibrationError("calibrate takes several batches: put a single one in a list")
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(resting(inlay, methods))
        watch = Watch(inlay, methods, stack)
        total, done = len(batches) if isinstance(batches, Sized) else None, 0
        for batch in batches:
            watch.see(model, batch, loss)
            done += 1
            if progress is not None:
                progress(done, total)
            if watch.settled:
                break
        if not done:
            raise CalibrationError("there was no batch to calibrate with")
        found = watch.found()
    with torch.no_grad(), plain_arithmetic(inlay.device), all_or_nothing(inlay):
        tensors = {method: method.calibrated(found) for method in methods}
        for method in methods:
            put(method, tensors[method] | {"samples": torch.tensor(found[method].samples)})
        rebuild(inlay, methods)
    samples = max(statistic.samples for statistic in found.values())
    return Calibration(len(methods), done, samples, time.perf_counter() - started)


def wanting(inlay: Inlay) -> list[Calibrated]:
    """The active methods that start from data; CalibrationError where there is none."""
    levels = [level for name in inlay.active for level in inlay.levels(name)]
    found = {id(m): m for level in levels for m in level.method.modules() if isinstance(m, Calibrated)}
    if not found:
        names = ", ".join(dict.fromkeys(type(level.method).__name__ for level in levels)) or "none"
        raise CalibrationError(f"no active method starts from data (active: {names}): there is nothing to calibrate")
    return list(found.values())


# ---------------------------------------------------------------------- around the pass
@contextmanager
def resting(inlay: Inlay, methods: list[Calibrated]) -> Iterator[None]:
    """Take what is being calibrated out of the network; all else that is active acts, and trains nothing now."""
    wanted = {id(method) for method in methods}

    def rests(level: Level) -> bool:
        return any(id(m) in wanted for m in level.method.modules())

    asking = [p for p in inlay.parameters() if p.requires_grad]
    held = [(mount, mount.levels) for mount in inlay.everything]
    for p in asking:
        p.requires_grad_(False)
    for mount, levels in held:
        mount.levels = {name: [lv for lv in stack if not rests(lv)] for name, stack in levels.items()}
    try:
        with inlay.only(*inlay.active):
            yield
    finally:
        for mount, levels in held:
            mount.levels = levels
        for p in asking:
            p.requires_grad_(True)


# ---------------------------------------------------------------------- putting tensors in their place
def put(method: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a method's tensors these numbers and shapes; they stay the same objects, types and devices."""
    own = dict(method.named_parameters()) | dict(method.named_buffers())
    for name, t in tensors.items():
        own[name].data = t.to(own[name].device, own[name].dtype, copy=True).contiguous()


@contextmanager
def all_or_nothing(inlay: Inlay) -> Iterator[None]:
    """Adapters have their tensors back, as they were, when the context ends with an error."""
    held = [(t, t.data) for t in (*inlay.adapters.parameters(), *inlay.adapters.buffers())]
    try:
        yield
    except BaseException:
        for t, data in held:
            t.data = data
        raise


def rebuild(inlay: Inlay, methods: list[Calibrated]) -> None:
    """Build what is made of the calibrated methods again, on top of what they are now; innermost first."""
    calibrated = {id(method) for method in methods}
    for name in inlay.active:
        for root in {id(level.method): level.method for level in inlay.levels(name)}.values():
            for outer in reversed([m for m in root.modules() if isinstance(m, Method)]):
                if id(outer) not in calibrated and any(id(m) in calibrated for m in outer.modules()):
                    put(outer, begun_again(outer))


def begun_again(outer: Method) -> dict[str, Tensor]:
    """The tensors of its own that a method would begin with on what it is made of now."""
    twin = type(outer)(**outer.fields())
    twin.__dict__["_site"] = outer.site
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin.build(outer.site)
    return twin.own_tensors()


def fit(own: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give what calibration may have resized the shapes of these tensors, named as in the state dict of `own`."""
    for slot, root in own.named_children():
        if isinstance(root, Method) and starts_from_data(root):
            for name, t in (*root.named_parameters(), *root.named_buffers()):
                kept = tensors.get(f"{slot}.{name}")
                if kept is not None and kept.shape != t.shape:
                    t.data = t.new_empty(kept.shape)
