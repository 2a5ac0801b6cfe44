"""Tensors that are spread over processes (FSDP2): seeing that they are, and reading them whole.

FSDP2 holds every tensor as a `DTensor`, this process's shard of it, and puts the whole in its place while the forward
and backward passes of its group of modules run; the trained tensors under `model.inlay` belong to the root's group.
Reading a spread tensor whole is a collective: every process must take part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(t: Tensor | None) -> bool:
    """Whether this process holds a part of a tensor only."""
    if t is None or type(t) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # a slow import

    return isinstance(t, DTensor)


def spreads(model: nn.Module) -> bool:
    """Whether FSDP2 holds the tensors of a model, or of a part that has one of its own; it must be loaded to do so."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def whole(t: Tensor) -> Tensor:
    """The whole of a tensor, gathered from all processes where it is spread."""
    if not is_sharded(t):
        return t
    from torch.distributed.tensor import DTensor

    assert isinstance(t, DTensor)
    return t.full_tensor()


def is_spread(module: nn.Module) -> bool:
    """Whether the tensors of a module are spread, though a forward pass may just have put the whole ones there."""
    module.state_dict()  # FSDP2 puts its shards back in a hook of this
    return any(is_sharded(p) for p in module.parameters())


@contextmanager
def assembled(module: nn.Module) -> Iterator[list[DTensor]]:
    """Whole tensors in place of the shards that a module holds now, which are yielded, while the context lasts."""
    shards = [(part, name, p) for part in module.modules() for name, p in part._parameters.items() if is_sharded(p)]
    try:
        for part, name, p in shards:
            assert p is not None
            part._parameters[name] = nn.Parameter(whole(p.detach()), requires_grad=p.requires_grad)
        yield [p for _, _, p in shards]  # type: ignore[misc]
    finally:
        for part, name, p in shards:
            part._parameters[name] = p


@contextmanager
def gathered(module: nn.Module) -> Iterator[bool]:
    """Whole tensors in a module while the context lasts; every process waits for the first at its end.

    Yields whether this process is the first of those that hold parts of the module: the one to write files. A module
    that is not spread is left alone, nothing waits, and every process that asks is the first.
    """
    if not is_spread(module):
        yield True
        return
    with assembled(module) as shards:
        mesh = shards[0].device_mesh
        try:
            yield not any(mesh.get_coordinate() or ())
        finally:
            for dim in range(mesh.ndim):
                torch.distributed.barrier(mesh.get_group(dim))
