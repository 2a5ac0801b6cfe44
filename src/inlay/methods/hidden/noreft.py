from __future__ import annotations

from typing import ClassVar

from inlay.core.method import register
from inlay.methods.hidden.intervention import Free, Maps


@register
class NoReFT(Free):
    """h ← h + W₂ᵀ(W₁ h + b − W₂ h) at chosen positions, W₁ and W₂ (r, d) free.

    LoReFT without the orthonormality: the paper's ablation. By default W₂ starts at zero, which is the base itself;
    `init="paper"` starts both as nn.Linear.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2404.03592"
    learning_rate: ClassVar[float] = 5e-3

    def maps(self) -> Maps:
        return Maps(self.W2, self.b, self.W1, self.W2, self.activation)
