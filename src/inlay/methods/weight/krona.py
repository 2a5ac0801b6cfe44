from __future__ import annotations

from typing import ClassVar

from inlay.core.method import DeltaMethod, option, register
from inlay.core.products import Kronecker
from inlay.core.sites import Site
from inlay.methods.weight.kronecker import pair, pair_size


@register
class KronA(DeltaMethod):
    """W′ = W + s·(A ⊗ B).

    A (a₁, a₂) and B (b₁, b₂) with a₁b₁ = d_out and a₂b₂ = d_in, never multiplied out to be applied; the rank is that
    of A times that of B. By default a₁ is the divisor next above √d_out and a₂ that next below √d_in: 32×24 and 24×32
    for a width of 768. A starts normal with deviation 1/√a₂, B at zero (how the paper draws A could not be looked up).
    `KronAB` is the branch parallel to a whole feed-forward.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Edalati et al. 2022, arXiv 2212.10650"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 3e-2

    rows: int = option(default=0, doc="a₁, a divisor of d_out; 0: the one next above its square root", low=0)
    columns: int = option(default=0, doc="a₂, a divisor of d_in; 0: the one next below its square root", low=0)
    scale: float = option(default=1.0, doc="s, fixed", low=0.0)

    def build(self, site: Site) -> None:
        self.A, self.B = pair(self, site, site.d_out, site.d_in, self.rows, self.columns)

    def count(self, site: Site) -> int:
        return pair_size(self, site.d_out, site.d_in, self.rows, self.columns)

    def delta(self) -> Kronecker:
        return Kronecker(self.scale * self.A, self.B)
