from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.core.transform import Blocks, Map, Product, Scale
from inlay.methods.weight.rotations import Rotation, cayley, fitting, resting, skew


@register
class BOFT(Rotation):
    """W′ = diag(s) W Rᵀ, R = B̃_m … B̃₁, B̃_i = P_i diag(R_i1, …, R_iD) P_iᵀ: a rotation from m butterfly factors.

    Every factor is block-diagonal in another order of the coordinates, so that m factors of small blocks make a dense
    rotation of 2^(m−1)·b coordinates; one factor is OFT. R_ij is Cayley's map of a skew-symmetric S_ij, as in OFT, of
    which the b(b−1)/2 entries above the diagonal are trained, from zero. The official code and PEFT store b×b numbers
    for each, with ½(Q − Qᵀ) for −S, and PEFT multiplies one factor where its CUDA extension is not built. s (d_out,),
    from one, is the output scale of the official code; R alone keeps lengths and angles of the rows of W.
    """

    paper: ClassVar[str] = "Liu et al. 2023, arXiv 2311.06243"

    block_size: int = option(default=8, doc="b; where it does not fit the width, the nearest size that does", low=2)
    factors: int = option(default=2, doc="butterfly factors m; D = d_in/b blocks must be a multiple of 2^(m−1)", low=1)
    scale: bool = option(default=True, doc="train the output scale s")
    dropout: float = option(
        default=0.0, doc="share of one factor's blocks that rest at each training step", low=0.0, high=1.0
    )

    def build(self, site: Site) -> None:
        b, d = self.size(site), self.width(site)
        orders = torch.stack([butterfly(d, b, i) for i in range(self.factors)])
        self.register_buffer("back", orders, persistent=False)  # P_i as indices
        self.register_buffer("order", orders.argsort(-1), persistent=False)
        self.S = nn.Parameter(torch.zeros(self.factors, d // b, b * (b - 1) // 2, dtype=site.dtype))
        self.s = nn.Parameter(torch.ones(site.d_out, dtype=site.dtype)) if self.scale else None

    def count(self, site: Site) -> int:
        return self.factors * self.width(site) * (self.size(site) - 1) // 2 + (site.d_out if self.scale else 0)

    def size(self, site: Site) -> int:
        return fitting(site, self.width(site), self.block_size, 2 ** (self.factors - 1))

    def rotation(self) -> Map:
        b = self.size(self.site)
        R = cayley(skew(self.S.flatten(0, 1), b)).unflatten(0, self.S.shape[:2])
        if self.training and self.dropout:
            one = torch.arange(self.factors, device=R.device) == torch.randint(self.factors, (1,), device=R.device)
            R = torch.where(one[:, None, None, None], torch.stack([resting(F, self.dropout) for F in R]), R)
        order, back = self.get_buffer("order"), self.get_buffer("back")
        return Product(*(Blocks(R[i], order[i] if i else None, back[i] if i else None) for i in range(self.factors)))

    def left(self) -> Map | None:
        maps: list[Map] = [self.turned()] if self.site.is_embedding else []
        return Product(*maps, *([] if self.s is None else [Scale(self.s)]))

    def exact_now(self) -> bool:
        return self.dropout == 0.0 or not self.training


def butterfly(d: int, b: int, i: int) -> Tensor:
    """P_i as indices (d,): in every run of 2^i blocks, half blocks of even number come first, then the odd ones."""
    halves = torch.arange(d).view(-1, 2 ** (i + 1), max(1, b // 2)) if i else torch.arange(d).view(-1, 1, 1)
    return torch.cat([halves[:, 0::2], halves[:, 1::2]], 1).flatten()
