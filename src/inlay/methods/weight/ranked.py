"""What updates of a chosen rank share: r, α and the scale they give, factors made from their shapes."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.core.draws import kept
from inlay.core.matrices import Dense, LowRank, Matrix
from inlay.core.method import DeltaMethod, Method, option, uniform
from inlay.core.sites import Site


class Ranked(DeltaMethod):
    """ΔW = s · (a product of factors of rank r),  s = α/r  (rank-stabilised: α/√r)."""

    kind: ClassVar[str] = "weight"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")

    r: int = option(default=8, doc="rank", low=1)
    alpha: float = option(default=8.0, doc="scale numerator α", low=0.0)
    rank_stabilized: bool = option(default=False, doc="s = α/√r instead of α/r")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (self.r**0.5 if self.rank_stabilized else self.r)


class Cored(Ranked):
    """The same in the LyCORIS family: the kernel of a convolution may have a core of its own (Tucker form).

    In training, rows of ΔW may rest, which LyCORIS and PEFT call rank dropout, and all of a place's ΔW.
    """

    row_dropout: float = option(default=0.0, doc="share of the rows of ΔW that rest in training", low=0.0, high=1.0)
    rescale: bool = option(default=True, doc="scale the other rows up by as much (PEFT: always for LoHa)")
    module_dropout: float = option(
        default=0.0, doc="probability with which ΔW of a place rests in training", low=0.0, high=1.0
    )
    tucker: bool = option(default=False, doc="a core of its own for a convolution's kernel, where that is not 1×1")

    def thins(self) -> bool:
        return self.training and bool(self.row_dropout or self.module_dropout)

    def thin(self, delta: Matrix) -> Matrix:
        if not self.thins():
            return delta
        if self.row_dropout:
            D = delta.dense()
            rows = kept((D.shape[0], 1), self.row_dropout, D)
            delta = Dense(D * (rows / rows.mean().clamp_min(1 / len(rows)) if self.rescale else rows))
        if self.module_dropout:
            delta = delta.scaled(kept((), self.module_dropout, next(self.parameters())))
        return delta

    def has_core(self, site: Site) -> bool:
        """Whether this site's factors have a core T (r, r, k…)."""
        return self.tucker and site.kernel_area > 1


@torch.no_grad()
def begin(update: LowRank, U: Tensor, S: Tensor, V: Tensor) -> None:
    """Set the factors of s·B A, in place, to U diag(S) Vᵀ with √(S/s) in either; ranks beyond those are zero."""
    root, r = (S / update.scale).sqrt(), len(S)
    for factor, start in ((update.B, U * root), (update.A.T, V * root)):
        factor.zero_()
        factor[:, :r] = start


Shapes = dict[str, tuple[int, ...]]
"""The factors of a method by name."""


def make_factors(method: Method, site: Site, shapes: Shapes, zero: str) -> None:
    """Trained tensors of these shapes: `zero` at zero, the others Kaiming-uniform, U(±1/√fan_in)."""
    for name, shape in shapes.items():
        made = torch.zeros(shape) if name == zero else uniform(shape, prod(shape[1:]) ** -0.5)
        method.register_parameter(name, nn.Parameter(made.to(site.dtype)))


def size(shapes: Shapes) -> int:
    """How many numbers they hold."""
    return sum(prod(shape) for shape in shapes.values())


def with_kernel(T: Tensor, A: Tensor) -> Tensor:
    """A (r, c·k…) from the core T (r, r, k…) and A (r, c) of a Tucker form: Σ_j T[i, j, k…] A[j, c]."""
    return torch.einsum("ijk,jc->ick", T, A).flatten(1)
