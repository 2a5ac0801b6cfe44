from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from inlay.core.method import option, register, uniform
from inlay.core.sites import Site
from inlay.methods.hidden.bottleneck import Activation
from inlay.methods.hidden.intervention import Maps, Rotated


@register
class LoReFT(Rotated):
    """h ← h + Rᵀ(W h + b − R h) at chosen positions, R (r, d) with orthonormal rows.

    By default W starts as a copy of R and b at zero, which is the base itself. `init="paper"` starts W and b as
    nn.Linear: it replaces what R sees of every edited state by a random projection before any training. Both reach the
    same maps. With an `activation` it is σ(W h + b), which no start makes the base. `difference=False` leaves R h out,
    h + Rᵀ(W h + b): pyreft's DireftIntervention, where W starts at zero.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2404.03592"

    activation: Activation = option(default="identity", doc="non-linearity σ on W h + b")
    difference: bool = option(default=True, doc="take R h off, so that W h + b is what R sees afterwards")
    init: Literal["base", "paper"] = option(
        default="base", doc="base: W = R (0 without the difference), b = 0; paper: W and b as nn.Linear"
    )

    def build(self, site: Site) -> None:
        d = self.features(site)
        R, b = self.turned(site), torch.zeros(self.sets, self.r)
        W = R if self.difference else torch.zeros_like(R)
        if self.init == "paper":
            W, b = uniform((self.sets, self.r, d), d**-0.5), uniform((self.sets, self.r), d**-0.5)
        self.W, self.b = (nn.Parameter(t.to(site.dtype)) for t in (W, b))

    def count(self, site: Site) -> int:
        return self.sets * (2 * self.r * self.features(site) + self.r)

    def maps(self) -> Maps:
        R = self.R
        return Maps(R, self.b, self.W, R if self.difference else None, self.activation)

    @property
    def starts_at_base(self) -> bool:
        return self.init == "base" and (self.activation == "identity" or not self.difference)
