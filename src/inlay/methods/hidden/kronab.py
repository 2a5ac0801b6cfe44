from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.core.errors import SiteError
from inlay.core.method import HiddenMethod, option, register
from inlay.core.products import Kronecker
from inlay.core.sites import Site
from inlay.methods.hidden.bottleneck import ends
from inlay.methods.weight.kronecker import pair, pair_size


@register
class KronAB(HiddenMethod):
    """y ← y + s·(A ⊗ B) x  (+ s_res·x), x the input and y the output of a feed-forward.

    KronA's branch parallel to a whole sub-layer, KronA^B. A (a₁, a₂) starts normal, B (b₁, b₂) at zero. With
    `residual` (KronA^B_res) the input comes once more, times a trained s_res, which starts at one: not the base, unless
    `residual_start` is zero. How A is drawn and where s_res starts could not be looked up in the paper.
    """

    paper: ClassVar[str] = "Edalati et al. 2022, arXiv 2212.10650"
    where: ClassVar[tuple[str, ...]] = ("mlp",)
    learning_rate: ClassVar[float] = 1e-2

    rows: int = option(default=0, doc="a₁, a divisor of d_out; 0: the one next above its square root", low=0)
    columns: int = option(default=0, doc="a₂, a divisor of d_in; 0: the one next below its square root", low=0)
    scale: float = option(default=1.0, doc="s, fixed", low=0.0)
    residual: bool = option(default=False, doc="add s_res·x")
    residual_start: float = option(default=1.0, doc="s_res at the start")

    @property
    def starts_at_base(self) -> bool:
        return not self.residual or self.residual_start == 0.0

    def build(self, site: Site) -> None:
        d_in, d_out = ends(self, site)
        if self.residual and d_in != d_out:
            raise SiteError(f"{self.label()} adds the input of '{site.path}', {d_in} wide, to its output of {d_out}")
        self.A, self.B = pair(self, site, d_out, d_in, self.rows, self.columns)
        self.s_res = nn.Parameter(torch.tensor(self.residual_start, dtype=site.dtype)) if self.residual else None

    def count(self, site: Site) -> int:
        d_in, d_out = ends(self, site)
        return pair_size(self, d_out, d_in, self.rows, self.columns) + self.residual

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        y = Kronecker(self.scale * self.A, self.B).add_to(y, x)
        return y if self.s_res is None else y + self.s_res.to(x.dtype) * x
