from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from inlay.core.errors import OptionError, SiteError
from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.core.transform import Map, Pairs, TransformMethod


@register
class RoAd(TransformMethod):
    """W′ = R W, b′ = R b, R = diag(R₁, …) of 2×2 blocks R_i = [[α₁cos θ₁, −α₂sin θ₂], [α₃sin θ₃, α₄cos θ₄]].

    Pairs of outputs are turned and scaled, element by element: y′ = y ⊙ c₁ + rot(y) ⊙ c₂. In RoAd₁ the four entries of
    a block share one θ and one α, in RoAd₂ the two of a row do, in RoAd₄ none. θ starts at zero and α at one, which is
    the base itself. A pair is two neighbours, as in the paper; `group=64` pairs output i with i + 32 in every run of
    64, as PEFT does. Outputs beyond the last whole group stay as they are. The outputs of a convolution are its
    channels, those of an embedding the entries of its vectors.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Liao & Monz 2024, arXiv 2409.00119"
    where: ClassVar[tuple[str, ...]] = ("all-linear",)
    learning_rate: ClassVar[float] = 2e-2
    turns_bias: ClassVar[bool] = True

    variant: Literal[1, 2, 4] = option(default=1, doc="θ and α for each block: one, one a row, one an entry")
    group: int = option(default=2, doc="outputs i and i + group/2 of every group make a pair; 2: neighbours", low=2)

    def validate(self) -> None:
        if self.group % 2:
            raise OptionError(f"RoAd: a group is made of pairs, so it has an even size, got {self.group}")

    def build(self, site: Site) -> None:
        n = self.paired(site)
        if n == 0:
            raise SiteError(f"RoAd pairs outputs in groups of {self.group}, '{site.path}' has {site.d_out} of them")
        if site.groups > 1 and site.d_out // site.groups % self.group:
            raise SiteError(
                f"RoAd would mix the outputs of different groups of '{site.path}', which see different channels: "
                f"{site.d_out // site.groups} of a group are not whole groups of {self.group}"
            )
        shape = {1: (n // 2,), 2: (n,), 4: (2, n)}[self.variant]
        self.theta = nn.Parameter(torch.zeros(shape, dtype=site.dtype))
        self.alpha = nn.Parameter(torch.ones(shape, dtype=site.dtype))

    def count(self, site: Site) -> int:
        return self.paired(site) * self.variant

    def paired(self, site: Site) -> int:
        """Outputs in whole groups."""
        return site.d_out // self.group * self.group

    def left(self) -> Map | None:
        c1, c2 = self.alpha * self.theta.cos(), self.alpha * self.theta.sin()
        if self.variant == 4:  # one set for the entries on the diagonal, one for those beside it
            c1, c2 = c1[0], c2[1]
        elif self.variant == 1:
            half = self.group // 2
            c1, c2 = (c.view(-1, 1, half).expand(-1, 2, -1).flatten() for c in (c1, c2))
        return Pairs(c1, c2, self.group)
