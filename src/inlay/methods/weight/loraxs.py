from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.core.matrices import LowRank
from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.core.spectrum import svd
from inlay.methods.weight.ranked import Ranked


@register
class LoRAXS(Ranked):
    """W′ = W + s·B R A with B = U_r and A = Σ_r V_rᵀ of W, frozen.

    R (r, r) alone is trained, from N(0, deviation²): so near the base at the start that only counting shows it. B and
    A are computed from W again when an adapter is loaded, and compared with a print of those it was trained with.
    """

    paper: ClassVar[str] = "Bałazy et al. 2024, arXiv 2405.17604"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v", "attn.o", "mlp.up", "mlp.down")
    learning_rate: ClassVar[float] = 2e-2

    r: int = option(default=16, doc="rank", low=1)
    alpha: float = option(default=16.0, doc="scale numerator α", low=0.0)
    deviation: float = option(default=1e-5, doc="of R at the start; 0: exactly the base", low=0.0)
    iterations: int = option(
        default=10, doc="subspace iterations of the randomised SVD of large matrices; 0: exact", low=0
    )

    @property
    def starts_at_base(self) -> bool:
        return self.deviation == 0.0

    def build(self, site: Site) -> None:
        @cache
        def factors() -> tuple[Tensor, Tensor]:
            U, S, V = svd(site.weight, self.r, self.iterations)
            return U.to(site.dtype), (V * S).T.contiguous().to(site.dtype)

        self.derived = f"svd-{site.flat_key}-{self.r}-{self.iterations}"
        site.shared(f"{self.derived}-B", lambda: factors()[0], derived=True)
        site.shared(f"{self.derived}-A", lambda: factors()[1], derived=True)
        r = min(self.r, *site.shape)
        self.R = nn.Parameter((self.deviation * torch.randn(r, r)).to(site.dtype))

    def count(self, site: Site) -> int:
        return min(self.r, *site.shape) ** 2

    def delta(self) -> LowRank:
        B, A = (self.site.shared_now(f"{self.derived}-{name}").to(self.R.dtype) for name in "BA")
        return LowRank(B @ self.R, A, self.scale)
