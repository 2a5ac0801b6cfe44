from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from inlay.core.matrices import LowRank, Matrix
from inlay.core.method import option, register
from inlay.core.products import Kronecker
from inlay.core.sites import Site
from inlay.methods.weight.kronecker import divisors
from inlay.methods.weight.ranked import Cored, Shapes, make_factors, size, with_kernel


@register
class LoKr(Cored):
    """W′ = W + s·(C ⊗ B A),  s = α/r.

    With d_out = m_out·n_out and d_in = m_in·n_in, m ≤ n, C is (m_out, m_in) and the second factor (n_out, n_in) has
    rank r, or is one full matrix D where r ≥ max(n_out, n_in)/2. `decompose_both` makes C a product C₁C₂ as well,
    where r < max(m_out, m_in)/2. On a convolution the second factor holds the kernel (d_in counts c_in/groups), with
    `tucker` as B T A with a core T (r, r, k…). C (or C₁) starts at zero and the rest Kaiming-uniform, as in PEFT; with
    init "lycoris" D (or A) is zero instead. As in PEFT, s is α/r for full factors too, where LyCORIS has 1. As in
    LyCORIS, m ≤ n for every `factor`, where PEFT 0.21.2 swaps them if the factor is beyond the width's square root.
    """

    paper: ClassVar[str] = "Yeh et al. 2023, arXiv 2309.14859"
    learning_rate: ClassVar[float] = 3e-2

    factor: int = option(
        default=-1,
        low=-1,
        doc="m where it divides the width, else the largest m; -1: next to the square root",
    )
    decompose_both: bool = option(default=False, doc="give the small factor a low rank too")
    init: Literal["peft", "lycoris"] = option(
        default="peft", doc="which factor starts at zero: the small (peft) or the large (lycoris)"
    )

    def build(self, site: Site) -> None:
        shapes = self.shapes(site)
        zero = ("C1" if "C1" in shapes else "C") if self.init == "peft" else ("D" if "D" in shapes else "A")
        make_factors(self, site, shapes, zero)

    def count(self, site: Site) -> int:
        return size(self.shapes(site))

    def shapes(self, site: Site) -> Shapes:
        r, taps = self.r, site.kernel_area
        (m_out, n_out), (m_in, n_in) = (divisors(d, self.factor) for d in (site.d_out, site.d_in // taps))
        shapes: Shapes = {"C": (m_out, m_in)}
        if self.decompose_both and r < max(m_out, m_in) / 2:
            shapes = {"C1": (m_out, r), "C2": (r, m_in)}
        if r >= max(n_out, n_in) / 2:
            return shapes | {"D": (n_out, n_in * taps)}
        if self.has_core(site):
            return shapes | {"B": (n_out, r), "A": (r, n_in), "T": (r, r, taps)}
        return shapes | {"B": (n_out, r), "A": (r, n_in * taps)}

    def delta(self) -> Kronecker:
        p = dict(self.named_parameters())
        C = p["C"] if "C" in p else p["C1"] @ p["C2"]
        return Kronecker(self.scale * C, self.large(p))

    def large(self, p: Mapping[str, Tensor]) -> Tensor | Matrix:
        """The second factor."""
        if "D" in p:
            return p["D"]
        return LowRank(p["B"], with_kernel(p["T"], p["A"]) if "T" in p else p["A"])
