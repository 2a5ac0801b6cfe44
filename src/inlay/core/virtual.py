"""The layout of virtual tokens in a batch.

In each row the order is [left padding; P; tokens]: P stands where it would stand without padding, so a padded row
equals the unpadded one, relative positions included. Rows with fewer virtual tokens than others have masked columns
before them, which are left padding like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Virtual:
    """The virtual tokens of a batch, on the right of `width` columns."""

    width: int
    P: Tensor | None
    """(batch or 1, width, d)."""
    length: Tensor | None
    """How many each row has (batch, 1), where rows differ."""
    shift: Tensor | int
    """What prefixes add to the positions of a row's tokens, (batch, 1) where rows differ."""

    def mask(self, like: Tensor) -> Tensor:
        """(batch, width), 1 = a virtual token, in the type of a mask."""
        if self.length is None:
            return like.new_ones(like.shape[0], self.width)
        column = torch.arange(self.width, device=like.device)
        return (column >= self.width - self.length.to(like.device)).to(like.dtype)

    def widen(self, mask: Tensor) -> Tensor:
        """A padding mask (batch, tokens) with the virtual tokens in it."""
        return arrange(self.mask(mask), mask, mask)


def arrange(virtual: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """[left padding; virtual; tokens] of every row; (batch, columns) or (batch, columns, d)."""
    both = torch.cat([virtual, tokens], 1)
    if mask is None:
        return both
    width, pads = virtual.shape[1], left_padding(mask)
    j = torch.arange(both.shape[1], device=both.device)
    order = torch.where(j < pads, j + width, torch.where(j < pads + width, j - pads, j))
    return both.gather(1, order if both.dim() == 2 else order[..., None].expand(-1, -1, both.shape[2]))


def left_padding(mask: Tensor) -> Tensor:
    """How many columns come before each row's first token, (batch, 1)."""
    return mask.ne(0).int().argmax(1, keepdim=True)


def trimmed(output: Any, total: int, cut: int, at: int = 0) -> Any:
    """A module's output without `cut` columns from `at`, wherever it has `total`; of attention maps, the queries'."""
    if isinstance(output, Tensor):
        axis = {3: 1, 4: 2}.get(output.dim())
        return output if axis is None or output.shape[axis] != total else without(output, axis, cut, at)
    if isinstance(output, dict):
        return type(output)(**{name: trimmed(value, total, cut, at) for name, value in output.items()})
    if type(output) in (tuple, list):
        return type(output)(trimmed(value, total, cut, at) for value in output)
    return output


def without(t: Tensor, axis: int, cut: int, at: int) -> Tensor:
    """t without `cut` entries from `at` along an axis."""
    after = t.narrow(axis, at + cut, t.shape[axis] - at - cut)
    return torch.cat([t.narrow(axis, 0, at), after], axis) if at else after
