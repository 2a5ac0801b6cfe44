from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from inlay.core.errors import SiteError
from inlay.core.method import DeltaMethod, Method, option, register
from inlay.core.products import Kronecker
from inlay.core.sites import Site
from inlay.methods.weight.kronecker import divisors


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
    learning_rate: ClassVar[float] = 1e-2

    rows: int = option(default=0, doc="a₁, a divisor of d_out; 0: the one next above its square root", low=0)
    columns: int = option(default=0, doc="a₂, a divisor of d_in; 0: the one next below its square root", low=0)
    scale: float = option(default=1.0, doc="s, fixed", low=0.0)

    def build(self, site: Site) -> None:
        make_pair(self, site, site.d_out, site.d_in, self.rows, self.columns)

    def count(self, site: Site) -> int:
        return pair_size(self, site.d_out, site.d_in, self.rows, self.columns)

    def delta(self) -> Kronecker:
        return Kronecker(self.scale * self.A, self.B)


def make_pair(method: Method, site: Site, d_out: int, d_in: int, a1: int, a2: int) -> None:
    """The trained A and B of A ⊗ B (d_out, d_in)."""
    a1, a2 = split(method, d_out, d_in, a1, a2)
    A = torch.empty(a1, a2).normal_(std=a2**-0.5)
    method.A = nn.Parameter(A.to(site.dtype))
    method.B = nn.Parameter(torch.zeros(d_out // a1, d_in // a2, dtype=site.dtype))


def pair_size(method: Method, d_out: int, d_in: int, a1: int, a2: int) -> int:
    """How many numbers they hold."""
    a1, a2 = split(method, d_out, d_in, a1, a2)
    return a1 * a2 + (d_out // a1) * (d_in // a2)


def split(method: Method, d_out: int, d_in: int, a1: int, a2: int) -> tuple[int, int]:
    """a₁ and a₂; SiteError where they do not divide the widths."""
    a1, a2 = a1 or divisors(d_out)[1], a2 or divisors(d_in)[0]
    for name, a, d in (("rows", a1, d_out), ("columns", a2, d_in)):
        if d % a:
            raise SiteError(f"{method.label()}: {name}={a} does not divide the width {d}: take a divisor, or 0")
    return a1, a2
