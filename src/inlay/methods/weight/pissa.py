from __future__ import annotations

from typing import ClassVar

from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.core.spectrum import svd
from inlay.methods.weight.residual import Residual


@register
class PiSSA(Residual):
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

    def build(self, site: Site) -> None:
        U, S, V = svd(site.weight, self.r, self.iterations)
        root = (S / self.scale).sqrt()
        self.take_out(site, U * root, (V * root).T)
