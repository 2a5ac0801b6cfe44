from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from inlay.core.draws import Draw
from inlay.core.errors import OptionError
from inlay.core.matrices import LowRank
from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.methods.schedule.nested import OverLowRank

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from inlay.core.adapter import Adapter


@register
class DyLoRA(OverLowRank):
    """W′ = W + (r/b) s·B[:, :b] A[:b],  b ~ U{1, …, r} at each training step, over any low-rank update s·B A.

    One b for the whole model and step, so that the leading ranks learn to serve alone: the trained adapter works at
    every rank. Outside of training `rank` says which, 0 takes all. The factor r/b makes the scale of LoRA's α/r an α/b
    (as the authors' code does). With `frozen` only the b-th pair of vectors gets gradients (the paper's FROZEN).
    """

    paper: ClassVar[str] = "Valipour et al. 2022, arXiv 2210.07558"

    rank: int = option(default=0, doc="leading ranks used outside of training; 0: all", low=0)
    frozen: bool = option(default=False, doc="train the last of the drawn ranks alone")

    def build(self, site: Site) -> None:
        if self.rank > self.inner().rank:
            raise OptionError(f"{self.label()} has {self.inner().rank} ranks, it cannot use {self.rank}")
        self.draw = Draw()

    def delta(self) -> LowRank:
        whole = self.inner()
        b = 1 + self.draw.of(whole.rank) if self.training else self.rank or whole.rank
        B, A = whole.B[:, :b], whole.A[:b]
        if self.frozen and self.training:
            B, A = lasting(B), lasting(A.T).T
        return LowRank(B, A, whole.scale * whole.rank / b)

    def step(self, progress: float, optimizer: Optimizer | None) -> None:
        self.draw.next()


def use_rank(adapter: Adapter, n: int) -> None:
    """Let every DyLoRA of an attached adapter work at its leading n ranks; OptionError where one has fewer."""
    nested = [m for level in adapter.levels for m in level.method.modules() if isinstance(m, DyLoRA)]
    if not nested:
        raise OptionError(f"adapter '{adapter.name}' has no DyLoRA whose rank could be chosen")
    most = min(m.inner().rank for m in nested)
    if not 1 <= n <= most:
        raise OptionError(f"this adapter works at ranks 1 to {most}, got {n}")
    for m in nested:
        m.rank = n


def lasting(B: Tensor) -> Tensor:
    """B (d, b) with gradients for its last column alone."""
    last = B.new_zeros(B.shape[1])
    last[-1] = 1
    return last * B + (1 - last) * B.detach()
