from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.method import WeightMethod, option, register
from inlay.core.sites import Site
from inlay.core.transform import beside


@register
class WeightNorm(WeightMethod):
    """W′ = g ⊙ V / ‖V‖, row by row: length and direction of every weight vector are trained apart.

    V (d_out, d_in) starts as a copy of W and g (d_out,) at the row norms of W, which is the base itself. The paper
    trains both, so the adapter is as large as the matrix; `trained="g"` trains the lengths alone and keeps no copy,
    `trained="v"` the directions. DoRA trains g and a low-rank change of V. For an embedding table a row is one of the d
    dimensions, across the vocabulary; for a convolution one output channel. The paper's data-dependent start of g and
    b is for networks trained from scratch and would leave the base.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Salimans & Kingma 2016, arXiv 1602.07868"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 1e-3
    reads_weight: ClassVar[bool] = True

    trained: Literal["both", "g", "v"] = option(default="both", doc="lengths g, directions v, or both")

    def build(self, site: Site) -> None:
        W = site.weight
        wide = W.to(torch.promote_types(W.dtype, site.dtype))
        norms = torch.linalg.vector_norm(wide, dim=1)
        self.register_buffer("norms", norms, persistent=False)  # ‖W_i‖, W never moves
        self.g = nn.Parameter(norms.to(site.dtype).clone()) if self.trained != "v" else None
        self.v = nn.Parameter(wide.to(site.dtype).clone()) if self.trained != "g" else None

    def count(self, site: Site) -> int:
        return {"both": site.d_in + 1, "g": 1, "v": site.d_in}[self.trained] * site.d_out

    def ratio(self) -> Tensor:
        """g / ‖V‖, (d_out,)."""
        norms = self.get_buffer("norms")
        lengths = norms if self.v is None else torch.linalg.vector_norm(self.v, dim=1)
        return (norms if self.g is None else self.g) / lengths.clamp_min(1e-30)

    def weight(self, W: Tensor) -> Tensor:
        c = self.ratio()[:, None]
        return c.to(W.dtype) * W if self.v is None else (c.to(self.v.dtype) * self.v).to(W.dtype)

    def formed(self) -> bool:
        return self.v is not None

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.formed():
            return beside(self, x, y)
        c, bias = self.site.outward(self.ratio(), y), self.site.current_bias
        return c * y if bias is None else y + (c - 1) * (y - self.site.outward(bias, y))
