from __future__ import annotations

from typing import ClassVar

from inlay.core.method import register
from inlay.methods.hidden.intervention import Free, Maps


@register
class DiReFT(Free):
    """h ← h + W₂ᵀ(W₁ h + b) at chosen positions, W₁ and W₂ (r, d) free.

    LoReFT without the orthonormality and without the difference; LoRA on the residual stream, at some positions. By
    default W₂ starts at zero, which is the base itself; `init="paper"` starts both as nn.Linear. pyreft calls this
    NodireftIntervention; its DireftIntervention, with orthonormal rows, is `LoReFT(difference=False)`.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2404.03592"
    learning_rate: ClassVar[float] = 5e-3

    def maps(self) -> Maps:
        return Maps(self.W2, self.b, self.W1, sigma=self.activation)
