from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from inlay.core.draws import Draw
from inlay.core.errors import OptionError, SiteError
from inlay.core.matrices import LowRank
from inlay.core.method import DeltaMethod, option, register
from inlay.core.sites import Site
from inlay.methods.weight.lora import LoRA

if TYPE_CHECKING:
    from inlay.core.adapter import Adapter


@register
class DyLoRA(DeltaMethod):
    """W′ = W + (r/b) s·B[:, :b] A[:b],  b ~ U{1, …, r} at each training step, over any low-rank update s·B A.

    One b for the whole model and step, so that the leading ranks learn to serve alone: the trained adapter works at
    every rank. Outside of training `rank` says which, 0 takes all. The factor r/b makes the scale of LoRA's α/r an α/b
    (as the authors' code does). With `frozen` only the b-th pair of vectors gets gradients (the paper's FROZEN).
    """

    kind: ClassVar[str] = "schedule"
    paper: ClassVar[str] = "Valipour et al. 2022, arXiv 2210.07558"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 3e-3

    of: DeltaMethod = option(default=LoRA(), doc="the low-rank update whose ranks are nested")
    rank: int = option(default=0, doc="leading ranks used outside of training; 0: all", low=0)
    frozen: bool = option(default=False, doc="train the last of the drawn ranks alone")

    def validate(self) -> None:
        if self.of.dropout:
            raise OptionError(f"give dropout to DyLoRA, not to {self.of.label()} inside it")

    def build(self, site: Site) -> None:
        if self.rank > self.whole().rank:
            raise OptionError(f"{self.label()} has {self.whole().rank} ranks, it cannot use {self.rank}")
        self.draw = Draw()

    def count(self, site: Site) -> int:
        return self.of.count(site)

    def whole(self) -> LowRank:
        """The inner update with all its ranks."""
        update = self.of.delta()
        if not isinstance(update, LowRank):
            raise SiteError(f"DyLoRA nests ranks, but {self.of.label()} has none: its update is no product B A")
        return update

    def delta(self) -> LowRank:
        whole = self.whole()
        b = 1 + self.draw.of(whole.rank) if self.training else self.rank or whole.rank
        B, A = whole.B[:, :b], whole.A[:b]
        if self.frozen and self.training:
            B, A = lasting(B), lasting(A.T).T
        return LowRank(B, A, whole.scale * whole.rank / b)

    def bias_of(self, b: Tensor | None) -> Tensor | None:
        return self.of.bias_of(b)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.site.add(self.delta(), self.drop(x), y)
        bias = self.site.current_bias
        moved = self.of.bias_of(bias)
        return y if bias is None or moved is None else y + self.site.outward(moved - bias, y)

    def step(self, progress: float) -> None:
        self.draw.next()


def use_rank(adapter: Adapter, n: int) -> None:
    """Let every DyLoRA of an attached adapter work at its leading n ranks; OptionError where one has fewer."""
    nested = [m for level in adapter.levels for m in level.method.modules() if isinstance(m, DyLoRA)]
    if not nested:
        raise OptionError(f"adapter '{adapter.name}' has no DyLoRA whose rank could be chosen")
    most = min(m.whole().rank for m in nested)
    if not 1 <= n <= most:
        raise OptionError(f"this adapter works at ranks 1 to {most}, got {n}")
    for m in nested:
        m.rank = n


def lasting(B: Tensor) -> Tensor:
    """B (d, b) with gradients for its last column alone."""
    last = B.new_zeros(B.shape[1])
    last[-1] = 1
    return last * B + (1 - last) * B.detach()
