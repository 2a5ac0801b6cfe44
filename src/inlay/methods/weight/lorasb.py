from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.errors import CalibrationError
from inlay.core.matrices import LowRank
from inlay.core.method import DeltaMethod, Method, option, register
from inlay.core.sites import Site
from inlay.core.spectrum import svd
from inlay.core.statistics import Calibrated, Gradient


@register
class LoRASB(Calibrated, DeltaMethod):
    """W′ = W + B R A with orthonormal B and A, frozen; B R A starts as the best rank-r step of full fine-tuning.

    `inlay.calibrate` sums ∂L/∂W over its batches. AdamW's first step is ΔW₀ = −η sign(Σ ∂L/∂W) ≈ U_r Σ_r V_rᵀ, and
    B = U_r (d_out, r), R = Σ_r (r, r), A = V_rᵀ (r, d_in): the start is not the base but one step on. R alone is
    trained. Since B and A are orthonormal and no scale stands before them, the gradient of R is the projection of that
    of W and needs no correction. B and A are saved. Not calibrated, they are the singular vectors of W and R = 0.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Ponkshe et al. 2024, arXiv 2411.19557"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v", "attn.o", "mlp.up", "mlp.down")
    learning_rate: ClassVar[float] = 2e-2
    wants_gradient: ClassVar[bool] = True

    r: int = option(default=16, doc="rank", low=1)
    eta: float = option(default=1e-5, doc="η, how far the first step moves each number of W", low=0.0)
    iterations: int = option(
        default=10, doc="subspace iterations of the randomised SVD of large matrices; 0: exact", low=0
    )

    def plant(self, site: Site) -> None:
        U, _, V = svd(site.weight, self.r, self.iterations)
        self.register_buffer("B", U.to(site.dtype).contiguous())
        self.register_buffer("A", V.T.to(site.dtype).contiguous())
        self.R = nn.Parameter(torch.zeros(U.shape[1], V.shape[1], dtype=site.dtype))

    def count(self, site: Site) -> int:
        return min(self.r, *site.shape) ** 2

    def delta(self) -> LowRank:
        return LowRank(self.get_buffer("B") @ self.R, self.get_buffer("A"))

    def statistic(self) -> Gradient:
        return Gradient()

    def calibrated(self, found: Mapping[Method, Any]) -> dict[str, Tensor]:
        step = -self.eta * self.site.part_of(found[self].total).sign()
        if not step.any() and self.eta:
            raise CalibrationError(f"the loss does not depend on '{self.site.path}': no step could be found for it")
        U, S, V = svd(step.to(self.site.parameter_device), self.r, self.iterations)
        return {"B": U, "R": S.diag(), "A": V.T}
