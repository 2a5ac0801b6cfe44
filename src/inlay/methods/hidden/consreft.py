from __future__ import annotations

from typing import ClassVar

from inlay.core.method import register
from inlay.methods.hidden.intervention import Biased, Maps


@register
class ConsReFT(Biased):
    """h ← h + Rᵀ(b − R h) at chosen positions, R (r, d) with orthonormal rows.

    What R sees of an edited state is a constant b: the paper's ablation of W. It removes that part of the state, so no
    start is the base.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2404.03592"

    def maps(self) -> Maps:
        R = self.R
        return Maps(R, self.b, D=R)

    @property
    def starts_at_base(self) -> bool:
        return False
