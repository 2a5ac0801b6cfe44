from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.methods.hidden.intervention import Maps, Rotated


@register
class ConsReFT(Rotated):
    """h ← h + Rᵀ(b − R h) at chosen positions, R (r, d) with orthonormal rows.

    What R sees of an edited state is a constant b: the paper's ablation of W. It removes that part of the state, so no
    start is the base; b starts at zero, or with `init="paper"` U(0, 1) as in pyreft.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2404.03592"

    init: Literal["zero", "paper"] = option(default="zero", doc="zero: b = 0; paper: b uniform in (0, 1)")

    def build(self, site: Site) -> None:
        self.turned(site)
        b = torch.rand(self.sets, self.r) if self.init == "paper" else torch.zeros(self.sets, self.r)
        self.b = nn.Parameter(b.to(site.dtype))

    def count(self, site: Site) -> int:
        return self.sets * (self.r * self.features(site) + self.r)

    def maps(self) -> Maps:
        R = self.R
        return Maps(R, self.b, D=R)

    @property
    def starts_at_base(self) -> bool:
        return False
