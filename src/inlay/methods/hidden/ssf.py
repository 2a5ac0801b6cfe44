from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.hollow import hollow
from inlay.core.lean import Form, Gain
from inlay.core.method import WeightMethod, option, register
from inlay.core.sites import Site


@register
class SSF(WeightMethod):
    """y = γ ⊙ (W x + b) + β, so W′ = diag(γ) W and b′ = γ ⊙ b + β: the output of an operation is scaled and shifted.

    After every operation of a place: linear layers, convolutions and normalisations, whose affine parameters take γ
    and β when merged. β is trained where the base has a bias to take it. By default γ starts at one and β at zero,
    which is the base itself; `init="paper"` draws N(1, 0.02²) and N(0, 0.02²), as the official code does.
    """

    kind: ClassVar[str] = "hidden"
    paper: ClassVar[str] = "Lian et al. 2022, arXiv 2210.08823"
    where: ClassVar[tuple[str, ...]] = ("",)
    learning_rate: ClassVar[float] = 5e-3
    everywhere: ClassVar[bool] = True

    init: Literal["base", "paper"] = option(default="base", doc="base: γ = 1, β = 0; paper: normal, deviation 0.02")

    def build(self, site: Site) -> None:
        gamma, beta = torch.ones(site.d_out), torch.zeros(site.d_out)
        if self.init == "paper":
            gamma, beta = gamma + 0.02 * torch.randn(site.d_out), 0.02 * torch.randn(site.d_out)
        self.gamma = nn.Parameter(gamma.to(site.dtype))
        self.beta = nn.Parameter(beta.to(site.dtype)) if site.bias is not None else None

    def count(self, site: Site) -> int:
        return site.d_out * (1 if site.bias is None else 2)

    @property
    def starts_at_base(self) -> bool:
        return self.init == "base"

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        y = y * self.site.outward(self.gamma, y)
        return y if self.beta is None else y + self.site.outward(self.beta, y)

    def weight(self, W: Tensor) -> Tensor:
        return self.gamma.to(W.dtype)[:, None] * W

    def form(self) -> Form | None:
        return Gain(self.gamma, self.beta) if hollow(self.gamma) or bool(self.gamma.all()) else None

    def bias_of(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.beta is None else self.gamma.to(b.dtype) * b + self.beta.to(b.dtype)
