"""Tensors that have a shape but no numbers."""

from __future__ import annotations

from torch import Tensor


def hollow(t: Tensor) -> bool:
    """Whether a tensor has a shape but no numbers: on the meta device, or while a plan is made."""
    from torch._subclasses.fake_tensor import FakeTensor

    return t.is_meta or isinstance(t, FakeTensor)
