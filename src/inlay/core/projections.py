"""The projections of an attention: what its queries, keys and values are made by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from inlay.core.anatomy import Part
from inlay.core.hosts import host_of
from inlay.core.quantised import is_quantised, shape
from inlay.core.rows import Rows, rows_of


@dataclass(frozen=True, eq=False)
class Projection:
    """A matrix of an attention, or its part of a packed one, and the norm after it."""

    module: nn.Module
    rows: Rows | None
    """Which of the module's outputs, where it has others beside them."""
    d_out: int
    d_in: int
    norm: nn.Module | None = None

    def heads(self, x: Tensor, n: int) -> Tensor:
        """(p, d_in) ↦ (n, p, size), by the modules' own forward: hooks do not run."""
        y = self.module.forward(x)
        y = y if self.rows is None else self.rows.take(y, -1)
        if self.norm is not None and self.norms_heads(n):
            return self.norm.forward(y.unflatten(-1, (n, -1))).transpose(0, 1)
        y = y if self.norm is None else self.norm.forward(y)
        return y.unflatten(-1, (n, -1)).transpose(0, 1)

    def norms_heads(self, n: int) -> bool:
        """Whether the norm is over each head by itself."""
        assert self.norm is not None
        scale = self.norm._parameters.get("weight")
        return scale is None or scale.shape[0] == self.d_out // n


def projection(modules: Mapping[str, nn.Module], part: Part | None, norm: Part | None = None) -> Projection | None:
    """The projection at a place; None where there is none, or inlay does not know its kind."""
    module = modules[part.path] if part else None
    host = host_of(module) if module else None
    if part is None or module is None or host is None:
        return None
    if is_quantised(module):
        d_out, d_in = shape(module)
    else:
        weight = module._parameters[part.param]
        assert weight is not None
        d_out, d_in = (int(n) for n in host.to_matrix(weight).shape)
    rows = rows_of(part.rows)
    return Projection(module, rows, d_out if rows is None else rows.count, d_in, modules[norm.path] if norm else None)
