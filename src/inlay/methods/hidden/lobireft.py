from __future__ import annotations

from typing import ClassVar

from inlay.core.method import register
from inlay.methods.hidden.intervention import Biased, Maps


@register
class LobiReFT(Biased):
    """h ← h + Rᵀ b at chosen positions, R (r, d) with orthonormal rows.

    A bias along r directions: pyreft's ablation of all that depends on h. With b = 0 it starts at the base.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2404.03592"
    learning_rate: ClassVar[float] = 3e-2

    def maps(self) -> Maps:
        return Maps(self.R, self.b)

    @property
    def starts_at_base(self) -> bool:
        return self.init == "zero"
