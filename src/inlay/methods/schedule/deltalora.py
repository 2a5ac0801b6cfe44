from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from inlay.core.errors import OptionError
from inlay.core.matrices import LowRank
from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.methods.schedule.nested import OverLowRank

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class DeltaLoRA(OverLowRank):
    """W_{t+1} = W_t + λ s·(B_{t+1} A_{t+1} − B_t A_t) from step K on, beside the trained update s·B A.

    W moves with the update without a gradient of its own. The sum telescopes, W_T − W_0 = λ s·(B_T A_T − B_K A_K), so
    the base itself need not move: A_K and B_K are kept instead, and the forward pass is that of the moved base, its
    gradient that of s·B A alone. The paper allows no dropout. λ = 2 is the paper's; there is no official code.
    """

    paper: ClassVar[str] = "Zi et al. 2023, arXiv 2309.02411"

    ratio: float = option(default=2.0, doc="λ, how far W moves for what the update moves", low=0.0)
    start: float = option(default=0.1, doc="share of the run after which W moves", low=0.0, high=1.0)

    def validate(self) -> None:
        super().validate()
        if self.dropout:
            raise OptionError("Delta-LoRA has no dropout: W would move by another update than the one that was trained")

    def build(self, site: Site) -> None:
        now = self.inner()
        self.register_buffer("A_K", torch.zeros_like(now.A, requires_grad=False))
        self.register_buffer("B_K", torch.zeros_like(now.B, requires_grad=False))
        self.register_buffer("moving", now.A.new_zeros(()))  # 0 or 1, a factor rather than a branch

    def delta(self) -> LowRank:
        now, moved = self.inner(), self.ratio * self.get_buffer("moving")
        B = torch.cat([now.B, moved * now.B.detach(), -moved * self.get_buffer("B_K")], 1)
        return LowRank(B, torch.cat([now.A, now.A.detach(), self.get_buffer("A_K")]), now.scale)

    @torch.no_grad()
    def step(self, progress: float, optimizer: Optimizer | None) -> None:
        if progress >= self.start and not self.get_buffer("moving"):
            now = self.inner()
            self.get_buffer("A_K").copy_(now.A)
            self.get_buffer("B_K").copy_(now.B)
            self.get_buffer("moving").fill_(1)
