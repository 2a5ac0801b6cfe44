from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.core.contexts import ContextMethod
from inlay.core.errors import SiteError
from inlay.core.method import InsertedMethod, option, register
from inlay.core.sites import Site
from inlay.core.tracks import Track


@register
class MaPLe(ContextMethod, InsertedMethod):
    """P_j enters text block j and F_j(P_j) = W_j P_j + b_j vision block j, j < J: prompts of both towers, coupled.

    P_j (M, d) stand in the class prompts, first in the place of their first M words, then in that of what the block
    before made of them; their images under F_j, W_j (d_v, d), stand among the image's patches, without positions.
    After J blocks both go on as the blocks make them. The image tower must be a transformer.
    """

    paper: ClassVar[str] = "Khattak, Rasheed, Maaz, Khan & Khan 2023, arXiv 2210.03117"
    learning_rate: ClassVar[float] = 3e-3

    tokens: int = option(default=2, doc="vectors M in each tower", low=1)
    depth: int = option(default=9, doc="blocks J that are given vectors; at most those of the smaller tower", low=1)

    @property
    def starts_at_base(self) -> bool:
        return False

    def most_words(self) -> int | None:
        return self.tokens

    def build(self, site: Site) -> None:
        J, track = self.blocks(site), self.track(site)
        later = [torch.randn(self.tokens, site.features) * self.scale for _ in range(J - 1)]
        self.P = nn.Parameter(torch.stack([self.start(site), *(P.to(site.dtype) for P in later)]))
        self.F = nn.ModuleList(nn.Linear(site.features, track.width, dtype=site.dtype) for _ in range(J))

    def track(self, site: Site) -> Track:
        assert site.tower is not None
        joint = site.tower.joint
        if joint is None or joint.track is None:
            kind = "its image tower" if joint is None else type(joint.vision).__name__
            raise SiteError(f"MaPLe puts vectors among an image's patches, and {kind} has no hidden states of them")
        return joint.track

    def blocks(self, site: Site) -> int:
        """J."""
        assert site.tower is not None
        return min(self.depth, len(site.tower.blocks), len(self.track(site).blocks))

    def count(self, site: Site) -> int:
        """J·M·d + J·(d·d_v + d_v)."""
        d, v = site.features, self.track(site).width
        return self.blocks(site) * (self.tokens * d + d * v + v)

    def context(self, images: Tensor | None) -> Tensor:
        return self.P[:1, None]

    def deeper(self, i: int) -> Tensor | None:
        return self.P[i] if i < len(self.P) else None

    def inserted(self, i: int, x: Tensor) -> Tensor | None:
        return self.F[i](self.P[i]) if i < len(self.P) else None
