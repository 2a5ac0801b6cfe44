from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.method import option, register, uniform
from inlay.core.sites import Site
from inlay.methods.hidden.intervention import Intervention


@register
class DiReFT(Intervention):
    """h ← h + W₂ᵀ(W₁ h + b) at chosen positions, W₁ and W₂ (r, d) free.

    LoReFT without the orthonormality and without the difference; LoRA on the residual stream, at some positions. By
    default W₂ starts at zero, which is the base itself; `init="paper"` starts both as nn.Linear.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv 2404.03592"
    learning_rate: ClassVar[float] = 5e-3

    init: Literal["base", "paper"] = option(default="base", doc="base: W₂ = 0; paper: W₁, b and W₂ as nn.Linear")

    def build(self, site: Site) -> None:
        d = self.features(site)
        W1, W2 = (uniform((self.sets, self.r, d), d**-0.5) for _ in range(2))
        b = uniform((self.sets, self.r), d**-0.5)
        if self.init == "base":
            W2, b = torch.zeros_like(W2), torch.zeros_like(b)
        self.W1, self.W2, self.b = (nn.Parameter(t.to(site.dtype)) for t in (W1, W2, b))

    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.W1, self.b, self.W2

    @property
    def starts_at_base(self) -> bool:
        return self.init == "base"
