from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from inlay.core.errors import OptionError
from inlay.core.matrices import LowRank
from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.core.spectrum import svd
from inlay.methods.weight.ranked import Ranked


@register
class PiSSA(Ranked):
    """W′ = W_res + s·B A,  W_res = W − s·B₀A₀.

    B₀ = U_r √(Σ_r/s) and A₀ = √(Σ_r/s) V_rᵀ from the r largest singular values of W; B (d_out, r) and A (r, d_in)
    start there. The base is not replaced by W_res: the update ΔW = s (B A − B₀A₀) is computed as
    s ((B − B₀) A + B₀ (A − A₀)), which is zero to the bit at the start and loses no small difference in bfloat16.
    A₀ and B₀ are saved beside A and B, so a file means the same wherever it is loaded. It is a LoRA of rank 2r.
    """

    paper: ClassVar[str] = "Meng, Wang & Zhang 2024, arXiv 2404.02948"
    learning_rate: ClassVar[float] = 3e-3

    iterations: int = option(
        default=4, doc="subspace iterations of the randomised SVD of large matrices; 0: exact", low=0
    )

    def validate(self) -> None:
        if not self.alpha:
            raise OptionError(f"{self.label()}: with alpha=0 no update is left, and Σ/s has no value")

    def build(self, site: Site) -> None:
        U, S, V = svd(site.weight, self.r, self.iterations)
        root = (S / self.scale).sqrt()
        B, A = (U * root).to(site.dtype), (V * root).T.contiguous().to(site.dtype)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("A0", A.clone())
        self.register_buffer("B0", B.clone())

    def count(self, site: Site) -> int:
        return min(self.r, *site.shape) * (site.d_in + site.d_out)

    def delta(self) -> LowRank:
        A0, B0 = self.get_buffer("A0"), self.get_buffer("B0")
        return LowRank(torch.cat([self.B - B0, B0], 1), torch.cat([self.A, self.A - A0]), self.scale)
