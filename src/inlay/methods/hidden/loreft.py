from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.method import option, register, uniform
from inlay.core.sites import Site
from inlay.methods.hidden.intervention import Intervention


@register
class LoReFT(Intervention):
    """h ← h + Rᵀ(W h + b − R h) at chosen positions, R (r, d) with orthonormal rows.

    The trained tensor is A (r, d), and R the orthonormal factor of its LQ decomposition A = L R, so R Rᵀ = I holds
    whatever the optimizer does and A is stored and loaded like any parameter. By default W starts as a copy of R and b
    at zero, which is the base itself. `init="paper"` starts W and b as nn.Linear: it replaces what R sees of every
    edited state by a random projection before any training. Both reach the same maps.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2404.03592"

    init: Literal["base", "paper"] = option(default="base", doc="base: W = R, b = 0; paper: W and b as nn.Linear")

    def build(self, site: Site) -> None:
        d = self.features(site)
        A = orthonormal(torch.randn(self.sets, self.r, d))
        W, b = orthonormal(A.to(site.dtype)), torch.zeros(self.sets, self.r)
        if self.init == "paper":
            W, b = uniform((self.sets, self.r, d), d**-0.5), uniform((self.sets, self.r), d**-0.5)
        self.A, self.W, self.b = (nn.Parameter(t.to(site.dtype)) for t in (A, W, b))

    @property
    def R(self) -> Tensor:
        """(sets, r, d), orthonormal rows."""
        return orthonormal(self.A)

    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        R = self.R
        return self.W - R, self.b, R

    @property
    def starts_at_base(self) -> bool:
        return self.init == "base"


def orthonormal(A: Tensor) -> Tensor:
    """R of A = L R, L lower triangular with a positive diagonal; R = A where the rows are orthonormal already."""
    Q, U = torch.linalg.qr(A.mT.to(torch.promote_types(A.dtype, torch.float32)))
    return (Q * U.diagonal(dim1=-2, dim2=-1).sgn()[..., None, :]).mT.to(A.dtype)
