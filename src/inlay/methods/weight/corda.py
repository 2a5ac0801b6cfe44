from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from inlay.core.errors import CalibrationError
from inlay.core.method import Method, option, register
from inlay.core.sites import Site
from inlay.core.spectrum import svd
from inlay.core.statistics import Calibrated, Moment
from inlay.methods.weight.residual import Residual


@register
class CorDA(Calibrated, Residual):
    """W′ = W_res + s·B A,  W_res = W − s·B₀A₀, from the singular values of W C.

    C (d_in, d_in) is the second moment of the inputs of W, which `inlay.calibrate` gathers. With W C = U Σ Vᵀ, so that
    W = U Σ (Vᵀ C⁻¹), B₀ = U_I √(Σ_I/s) and A₀ = √(Σ_I/s) V_Iᵀ C⁻¹. Instruction-previewed, I are the r largest: inputs
    of the task to be learnt. Knowledge-preserved, the r smallest: inputs whose knowledge must stay. C is scaled to a
    mean diagonal of 1, which leaves B₀A₀ as it is, and damped so that it has an inverse. As with PiSSA the base is not
    replaced, A₀ and B₀ are saved, and the start is the base to the bit. Not calibrated, C = I: PiSSA, or with the
    smallest MiLoRA's split.
    """

    paper: ClassVar[str] = "Yang et al. 2024, arXiv 2406.05223"
    learning_rate: ClassVar[float] = 3e-3

    mode: Literal["instruction", "knowledge"] = option(
        default="instruction", doc="which components are trained: the largest (previewed), or the smallest (preserved)"
    )
    damping: float = option(default=0.01, doc="added to the diagonal of C, in units of its mean", low=0.0)
    iterations: int = option(
        default=4, doc="subspace iterations of the randomised SVD for the largest; 0: exact", low=0
    )

    def plant(self, site: Site) -> None:
        B, A = self.split(site.weight)
        self.take_out(site, B, A)

    def split(self, product: Tensor) -> tuple[Tensor, Tensor]:
        """U_I √(Σ_I/s) and √(Σ_I/s) V_Iᵀ of W C."""
        if self.mode == "instruction":
            U, S, V = svd(product, self.r, self.iterations)
        else:
            r = min(self.r, *product.shape)
            U, S, V = (t[..., -r:] for t in svd(product))
        root = (S / self.scale).sqrt()
        return U * root, (V * root).T

    def statistic(self) -> Moment:
        return Moment()

    def calibrated(self, found: Mapping[Method, Any]) -> dict[str, Tensor]:
        self.enough(found[self], min(self.r, *self.site.shape))
        C = found[self].mean.double()
        level = C.diagonal().mean()
        if not level > 0:
            raise CalibrationError(f"the inputs at '{self.site.path}' are all zero: there is nothing to start from")
        C = C / level
        C.diagonal().add_(self.damping)
        root, failed = torch.linalg.cholesky_ex(C)
        if failed:
            raise CalibrationError(
                f"{self.label()}: the inputs at '{self.site.path}' leave directions out, C has no inverse: give more "
                "batches, or more damping"
            )
        W = self.site.weight
        B, A = self.split((W.double() @ C).to(torch.promote_types(W.dtype, torch.float32)))
        A = torch.cholesky_solve(A.T.double(), root).T
        return {"A": A, "B": B, "A0": A, "B0": B}
