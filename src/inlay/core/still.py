"""What holds while nothing trains is computed once: DoRA's norms, rotations, what a small network makes of its input.

A method asks for such a value with `Method.once`. It is kept from one forward of the whole model to the next while
gradients are off and the method is in evaluation mode, and made again when a tensor that it may depend on has changed:
the method's own, the shared ones it uses, and those of the module it sits at. A change shows in a tensor's storage,
type and version counter: optimizer steps, `load_state_dict`, `.to(…)`, exchanged modules. What moves no counter (fused
optimizers, writes through `.data`) is met by forgetting everything in each forward that may train, and whenever the
model's mode is set, by `train()` or `eval()`.

Nothing is kept where forwards are compiled, traced, captured as a CUDA graph, transformed by `torch.func` or watched by
a dispatch mode, nor under FSDP2, whose whole tensors come and go behind their counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from inlay.core.leaves import transformed
from inlay.core.sharded import spreads

if TYPE_CHECKING:
    from inlay.core.method import Method

T = TypeVar("T")
Stamp = list[tuple[int, int, torch.dtype]]


@dataclass
class Kept:
    """A value, and the tensors it was made from as they were then."""

    value: Any
    module: nn.Module
    """The base's module, which a merge may exchange."""
    holders: list[dict[str, Any]]
    """Where those tensors are, as tensors themselves are put in each other's places."""
    stamp: Stamp
    mode: torch.dtype | None
    """The type of autocast, where that was on."""
    storages: list[StorageWeakRef]
    """They keep the storages' addresses, not their memory, so that no other has the same."""


@dataclass
class Still:
    """The values of one model's methods. A copy of the model begins with none."""

    on: bool = False
    """Whether the forward that is running is one between which values may be kept."""
    kept: dict[tuple[Method, str], Kept] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Still:
        return Still()

    def __reduce__(self) -> tuple[type[Still], tuple[()]]:
        return Still, ()

    def begin(self, model: nn.Module) -> None:
        """A forward of the whole model begins; not called in compiled ones."""
        if torch.is_grad_enabled():
            self.forget()
        self.on = not (torch.is_grad_enabled() or elsewhere() or spreads(model))

    def end(self) -> None:
        self.on = False

    def forget(self) -> None:
        """Let go of all values."""
        self.kept.clear()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Values may be kept while the context lasts, which changes no tensor that they are made from."""
        self.on = not elsewhere()
        try:
            yield
        finally:
            self.end()

    def get(self, method: Method, name: str, make: Callable[[], T]) -> T:
        """`make()`, or what it gave when the tensors that `method` reads were the same as now."""
        if torch.compiler.is_compiling() or not self.on or method.training or torch.is_grad_enabled() or transformed():
            return make()
        site, kept = method.site, self.kept.get((method, name))
        if kept is not None and kept.module is site.module:
            now = stamp(kept.holders)
            if now is not None and now[0] == kept.stamp and now[1] == kept.mode:
                return kept.value
        value, holders = make(), holders_of(method)
        now = stamp(holders)
        if now is not None:
            storages = [StorageWeakRef(t.untyped_storage()) for t in tensors(holders)]
            self.kept[method, name] = Kept(value, site.module, holders, *now, storages)
        return value


def elsewhere() -> bool:
    """Whether what is computed now is a recording, or a computation about this one, rather than the thing itself."""
    return (
        torch.jit.is_tracing()
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        or torch._C._len_torch_dispatch_stack() > 0
    )


def holders_of(method: Method) -> list[dict[str, Any]]:
    """Where the tensors are that a method may read."""
    site = method.site
    own = [holder for module in method.modules() for holder in (module._parameters, module._buffers)]
    shared = [] if site.inlay is None or not site.uses else [site.inlay.tensors._buffers]
    return [holder for holder in (*own, site.module._parameters, site.module._buffers, *shared) if holder]


def tensors(holders: list[dict[str, Any]]) -> Iterator[Tensor]:
    for holder in holders:
        yield from (t for t in holder.values() if t is not None)


PLAIN = (Tensor, nn.Parameter)


def stamp(holders: list[dict[str, Any]]) -> tuple[Stamp, torch.dtype | None] | None:
    """What tells tensors from what they were; None where one of them has no counter, or is of a class of its own."""
    found: Stamp = []
    device = "cpu"
    for holder in holders:
        for t in holder.values():
            if t is None:
                continue
            if type(t) not in PLAIN or t.is_inference():
                return None
            found.append((t.untyped_storage()._cdata, t._version, t.dtype))
            device = t.device.type
    return found, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
