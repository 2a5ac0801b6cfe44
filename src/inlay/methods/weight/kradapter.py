from __future__ import annotations

from math import ceil, isqrt
from typing import ClassVar

import torch
from torch import nn

from inlay.core.matrices import Matrix
from inlay.core.method import DeltaMethod, option, register, uniform
from inlay.core.products import KhatriRao
from inlay.core.sites import Site


@register
class KRAdapter(DeltaMethod):
    """W′ = W + s·(V ⊙ U),  row i of the Khatri-Rao product: V_i ⊗ U_i.

    With m the smaller and M the larger of d_in and d_out, U is (m, p), p = ⌊√m⌋, and V (m, q) with the smallest q ≥ p
    for which p·q ≥ M; rows are cut to M numbers, and stand for inputs unless d_out is the smaller width. The rank can
    be full. U starts at zero, V U(±√(6/26q)) as in the official code. The update is formed to be applied.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Albert et al. 2025, arXiv 2508.00230"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 1e-2

    scale: float = option(default=2.0, doc="s", low=0.0)

    def build(self, site: Site) -> None:
        m, p, q = self.sizes(site)
        self.U = nn.Parameter(torch.zeros(m, p, dtype=site.dtype))
        self.V = nn.Parameter(uniform((m, q), (6 / (26 * q)) ** 0.5).to(site.dtype))
        self.width, self.transposed = max(site.shape), site.d_in <= site.d_out

    def count(self, site: Site) -> int:
        m, p, q = self.sizes(site)
        return m * (p + q)

    def sizes(self, site: Site) -> tuple[int, int, int]:
        """m, p and q."""
        m, p = min(site.shape), isqrt(min(site.shape))
        return m, p, max(p, ceil(max(site.shape) / p))

    def delta(self) -> Matrix:
        return KhatriRao(self.scale * self.U, self.V, self.width, self.transposed)
