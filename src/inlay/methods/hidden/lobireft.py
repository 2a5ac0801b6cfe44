from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.methods.hidden.intervention import Maps, Rotated


@register
class LobiReFT(Rotated):
    """h ← h + Rᵀ b at chosen positions, R (r, d) with orthonormal rows.

    A bias along r directions: pyreft's ablation of all that depends on h. By default b starts at zero, which is the
    base itself; `init="paper"` draws U(0, 1) as pyreft does.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2404.03592"
    learning_rate: ClassVar[float] = 3e-2

    init: Literal["base", "paper"] = option(default="base", doc="base: b = 0; paper: b uniform in (0, 1)")

    def build(self, site: Site) -> None:
        self.turned(site)
        b = torch.rand(self.sets, self.r) if self.init == "paper" else torch.zeros(self.sets, self.r)
        self.b = nn.Parameter(b.to(site.dtype))

    def count(self, site: Site) -> int:
        return self.sets * (self.r * self.features(site) + self.r)

    def maps(self) -> Maps:
        return Maps(self.R, self.b)

    @property
    def starts_at_base(self) -> bool:
        return self.init == "base"
