from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.matrices import LowRank
from inlay.core.method import option, register, uniform
from inlay.core.sites import Site
from inlay.methods.weight.ranked import Ranked, begin


@register
class LoRA(Ranked):
    """W′ = W + s·B A,  s = α/r  (rank-stabilised: α/√r).

    A (r, d_in) starts Kaiming-uniform, B (d_out, r) at zero; on an embedding table A is zero and B normal, so the
    look-up of either is cheap. On convolutions A has the base's kernel and B is 1×1; with groups, every group sees A
    on its own channels. `bias` gives the update a bias c as well: b′ = b + s·c.
    """

    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685 (rank-stabilised: Kalajdzievski 2023, arXiv 2312.03732)"
    learning_rate: ClassVar[float] = 3e-3

    init: Literal["kaiming", "gaussian"] = option(
        default="kaiming", doc="distribution of A; gaussian has deviation 1/r"
    )
    bias: bool = option(default=False, doc="train a bias of the update, where the base has one")

    def build(self, site: Site) -> None:
        A, B = torch.zeros(self.r, site.d_in), torch.zeros(site.d_out, self.r)
        if site.is_embedding:
            B.normal_()
        elif self.init == "gaussian":
            A.normal_(std=1 / self.r)
        else:
            A = uniform((self.r, site.d_in), site.d_in**-0.5)
        self.A, self.B = nn.Parameter(A.to(site.dtype)), nn.Parameter(B.to(site.dtype))
        offset = self.bias and site.bias is not None
        self.b = nn.Parameter(torch.zeros(site.d_out, dtype=site.dtype)) if offset else None

    def count(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out) + (site.d_out if self.bias and site.bias is not None else 0)

    def delta(self) -> LowRank:
        return LowRank(self.B, self.A, self.scale)

    def triplets(self) -> int:
        return self.r

    def begin_at(self, U: Tensor, S: Tensor, V: Tensor) -> None:
        begin(self.delta(), U, S, V)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.site.add(self.delta(), self.drop(x), y)
        return y if self.b is None else y + self.site.outward(self.scale * self.b, y)

    def bias_of(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.b is None else b + self.scale * self.b.to(b.dtype)
