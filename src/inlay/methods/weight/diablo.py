from __future__ import annotations

from math import ceil
from typing import ClassVar

import torch
from torch import nn

from inlay.core.matrices import BlockDiagonal
from inlay.core.method import DeltaMethod, option, register
from inlay.core.sites import Site


@register
class DiaBlo(DeltaMethod):
    """W′ = W + blockdiag(D₁, …, D_N).

    The blocks (d_out/N, d_in/N) on W's diagonal are trained, from zero; rectangular where W is. Where N does not
    divide a width, blocks have ⌈d/N⌉ rows and columns, as many as cover W, and the last are cut at its edge.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Gurses et al. 2025, arXiv 2506.03230"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.k", "attn.v", "mlp.up", "mlp.down")
    learning_rate: ClassVar[float] = 1e-2

    blocks: int = option(default=64, doc="N", low=1)

    def build(self, site: Site) -> None:
        self.D = nn.Parameter(torch.zeros(self.sizes(site), dtype=site.dtype))
        self.shape = site.shape

    def count(self, site: Site) -> int:
        n, m_out, m_in = self.sizes(site)
        return n * m_out * m_in

    def sizes(self, site: Site) -> tuple[int, int, int]:
        """(number, rows, columns) of the blocks."""
        m_out, m_in = ceil(site.d_out / self.blocks), ceil(site.d_in / self.blocks)
        return max(ceil(site.d_out / m_out), ceil(site.d_in / m_in)), m_out, m_in

    def delta(self) -> BlockDiagonal:
        return BlockDiagonal(self.D, self.shape)
