"""What one training step costs in memory: bytes saved for the backward pass, and the peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from inlay.optim import AdamW


def saved_for_backward(forward: Callable[[], Tensor], model: nn.Module) -> tuple[Tensor, int]:
    """(loss, bytes) of the storages autograd keeps for the backward pass, each storage once, parameters excluded."""
    weights = storages(model.parameters())
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    return loss, sum(kept.values())


class Watch(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is active, and their largest sum.

    Scratch space inside one kernel is not seen. Measured against torch's profiler on MiniLM: the same to 0.5 %, and
    unlike the process's resident size it repeats exactly and is not blurred by what other runs left behind.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.peak = known, 0, 0
        self.live: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self.add(t.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.live or key in self.known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.live[key]

        self.live[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """Identities of the tensors' storages; those without data (fake tensors, symbolic zeros) have one too."""
    return {t.untyped_storage()._cdata for t in tensors}


def resident(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, trained ones and adapters' frozen ones included, shared storages once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
def forward_memory(forward: Callable[[], Any], model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Peak bytes of a forward pass without a graph: what the model holds, and the largest sum of activations."""
    watch = Watch(storages([*model.parameters(), *model.buffers(), *batch.values()]))
    with watch:
        forward()
    return resident(model) + watch.peak


def step_memory(
    forward: Callable[[], Tensor], model: nn.Module, batch: dict[str, Tensor], optimizer: AdamW
) -> tuple[int, int]:
    """(saved-for-backward bytes, peak bytes) of a training step on one batch; leaves no gradients behind.

    The peak is what the model holds, the optimizer's state, and the largest sum of activations and gradients during
    forward and backward. With a GPU, the training loop reports the allocator's own peak instead.
    """
    tensors = [*model.parameters(), *model.buffers(), *batch.values()]
    watch = Watch(storages(tensors))
    with watch, optimizer.measuring():
        loss, saved = saved_for_backward(forward, model)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return saved, resident(model) + optimizer.state_bytes() + watch.peak
