from __future__ import annotations

from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.core.method import InsertedMethod, option, register, uniform
from inlay.core.sites import Site
from inlay.core.tracks import track_of


@register
class VPT(InsertedMethod):
    """[x_0, P_i, X] enters block i: p trained vectors P_i among the patches, other ones in every block.

    They stand after the class token, have no positions, and are cut off before pooling. What a block makes of them is
    dropped and the next block reads its own; with `deep=False` (VPT-shallow) there are vectors for the first block
    alone and the others go on from there. With `width` m they are W·P_i + b with trained P_i (p, m) and one W (d, m).
    """

    paper: ClassVar[str] = "Jia, Tang, Chen, Cardie, Belongie, Hariharan & Lim 2022, arXiv 2203.12119"
    learning_rate: ClassVar[float] = 1e-2

    tokens: int = option(default=10, doc="virtual tokens p", low=1)
    deep: bool = option(default=True, doc="other vectors in every block (VPT-deep), or in the first one (VPT-shallow)")
    width: int | None = option(default=None, doc="features m of the trained vectors; none: the model's own", low=1)
    dropout: float = option(default=0.0, doc="dropout on the vectors", low=0.0, high=1.0)

    def build(self, site: Site) -> None:
        m, conv = self.width or site.features, track_of(site).patch
        bound = sqrt(6 / (conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1] + m))
        self.P = nn.Parameter(uniform((self.depth(site), self.tokens, m), bound).to(site.dtype))
        if self.width is not None:
            self.W = nn.Parameter(torch.empty(site.features, m, dtype=site.dtype))
            nn.init.kaiming_normal_(self.W, a=0, mode="fan_out")
            self.b = nn.Parameter(torch.zeros(site.features, dtype=site.dtype))

    def depth(self, site: Site) -> int:
        """Blocks that have vectors of their own."""
        return len(track_of(site).blocks) if self.deep else 1

    def count(self, site: Site) -> int:
        """L·p·d deep and p·d shallow; L·p·m + d·m + d and p·m + d·m + d with vectors of m features."""
        d, m = site.features, self.width
        vectors = self.depth(site) * self.tokens
        return vectors * d if m is None else vectors * m + d * m + d

    def inserted(self, i: int, x: Tensor) -> Tensor | None:
        if i >= len(self.P):
            return None
        P = self.P[i] if self.width is None else F.linear(self.P[i], self.W, self.b)
        return F.dropout(P, self.dropout, self.training)
