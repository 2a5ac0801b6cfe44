"""Rows of a packed matrix: which outputs of a fused query-key-value projection belong to one of its parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """`groups` equal runs of rows; this part is `length` rows from `offset` in each (one group: a plain slice)."""

    offset: int
    length: int
    groups: int = 1
    group: int | None = None
    """Rows per group; needed when groups > 1."""

    @property
    def count(self) -> int:
        return self.groups * self.length

    def take(self, t: Tensor, dim: int) -> Tensor:
        """The part along `dim`: a view for one group."""
        if self.groups == 1:
            return t.narrow(dim, self.offset, self.length)
        dim = dim % t.dim()
        return (
            t.unflatten(dim, (self.groups, self.group)).narrow(dim + 1, self.offset, self.length).flatten(dim, dim + 1)
        )

    def put(self, t: Tensor, part: Tensor, dim: int) -> Tensor:
        """t with the part along `dim` replaced, out of place."""
        dim = dim % t.dim()
        if self.groups == 1:
            before, after = t.narrow(dim, 0, self.offset), t.narrow(dim, self.end, t.shape[dim] - self.end)
            return torch.cat([before, part, after], dim)
        whole = t.unflatten(dim, (self.groups, self.group))
        part = part.unflatten(dim, (self.groups, self.length))
        left = whole.narrow(dim + 1, 0, self.offset)
        right = whole.narrow(dim + 1, self.end, whole.shape[dim + 1] - self.end)
        return torch.cat([left, part, right], dim + 1).flatten(dim, dim + 1)

    @property
    def end(self) -> int:
        return self.offset + self.length

    def __str__(self) -> str:
        return f"{self.offset}:{self.end}" if self.groups == 1 else f"{self.groups}x{self.offset}:{self.end}"


def rows_of(spec: tuple | None) -> Rows | None:
    """From the anatomy's `("slice", start, stop)` or `("heads", groups, group_rows, offset, length)`."""
    if spec is None:
        return None
    if spec[0] == "slice":
        return Rows(spec[1], spec[2] - spec[1])
    _, groups, group, offset, length = spec
    return Rows(offset, length, groups, group)
