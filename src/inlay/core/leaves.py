"""Things made of tensors, and of other such things: take the tensors out, put others in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor


class Leaves:
    """A structure whose attributes hold its tensors, or parts (tuples of parts) that do."""

    def leaves(self) -> list[Tensor]:
        """Its tensors, those of its parts included, in a fixed order."""
        return [t for value in vars(self).values() for t in inside(value)]

    def made_of(self, tensors: Sequence[Tensor]) -> Self:
        """The same structure on other tensors, in the order of `leaves`."""
        return replaced(self, iter(tensors))


def inside(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Leaves):
        return value.leaves()
    return [t for item in value for t in inside(item)] if isinstance(value, tuple | list) else []


def replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, Leaves):
        other = copy(value)
        other.__dict__ = {name: replaced(part, tensors) for name, part in vars(value).items()}
        return other
    return type(value)(replaced(item, tensors) for item in value) if type(value) in (tuple, list) else value


def transformed() -> bool:
    """Whether `torch.func` is at work, as where one computation serves several adapters."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def gradients(made: Sequence[Tensor], leaves: Sequence[Tensor], known: Sequence[Tensor]) -> list[Tensor | None]:
    """Of leaves, where those of what was made from them are known; None for a leaf that wants none."""
    wanted = [t for t in leaves if t.requires_grad]
    if not wanted:
        return [None] * len(leaves)
    found = iter(torch.autograd.grad(made, wanted, known, create_graph=torch.is_grad_enabled()))
    return [next(found) if t.requires_grad else None for t in leaves]
