from __future__ import annotations

from typing import ClassVar

from inlay.core.matrices import LowRank
from inlay.core.method import register
from inlay.core.products import Hadamard
from inlay.core.sites import Site
from inlay.methods.weight.ranked import Cored, Shapes, make_factors, size, with_kernel


@register
class LoHa(Cored):
    """W′ = W + s·(B₁A₁) ⊙ (B₂A₂),  s = α/r.

    The product of two rank-r matrices, entry by entry, has rank up to r². B₁, B₂ (d_out, r) and A₁ (r, d_in) start
    Kaiming-uniform, A₂ at zero. On a convolution A has the base's kernel; with `tucker` (FedPara's proposition 3) the
    kernel has its own core T (r, r, k…) beside A (r, c_in). The update is formed to be applied. In the Tucker form PEFT
    0.21.2 trains B by what is not its gradient; its folders are read and written nevertheless.
    """

    paper: ClassVar[str] = "Hyeon-Woo, Ye-Bin & Oh 2021, arXiv 2108.06098; Yeh et al. 2023, arXiv 2309.14859"
    learning_rate: ClassVar[float] = 3e-2

    def build(self, site: Site) -> None:
        make_factors(self, site, self.shapes(site), zero="A2")

    def count(self, site: Site) -> int:
        return size(self.shapes(site))

    def shapes(self, site: Site) -> Shapes:
        taps, r = site.kernel_area, self.r
        width = site.d_in // taps if self.has_core(site) else site.d_in
        shapes: Shapes = {"B1": (site.d_out, r), "A1": (r, width), "B2": (site.d_out, r), "A2": (r, width)}
        return shapes | ({"T1": (r, r, taps), "T2": (r, r, taps)} if self.has_core(site) else {})

    def delta(self) -> Hadamard:
        return Hadamard(self.side(1, self.scale), self.side(2, 1.0))

    def side(self, k: int, scale: float) -> LowRank:
        """B_k A_k."""
        A, B = self.tensor(f"A{k}"), self.tensor(f"B{k}")
        return LowRank(B, with_kernel(self.tensor(f"T{k}"), A) if self.has_core(self.site) else A, scale)
