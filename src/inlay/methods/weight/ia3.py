from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.core.hollow import hollow
from inlay.core.lean import ColumnGain, Form, Gain
from inlay.core.method import WeightMethod, option, register
from inlay.core.sites import Site


@register
class IA3(WeightMethod):
    """W′ = diag(l) W, b′ = l ⊙ b;  in the feed-forward  W′ = W diag(l).

    Keys and values are scaled where they leave their projection, the feed-forward's hidden vector where it enters the
    down projection: l (d_out,) or (d_in,), starting at one.
    """

    kind: ClassVar[str] = "hidden"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv 2205.05638"
    where: ClassVar[tuple[str, ...]] = ("attn.k", "attn.v", "mlp.down")
    learning_rate: ClassVar[float] = 3e-2

    feedforward: list[str] = option(
        default=["mlp.down"], doc="neutral or module names whose input is scaled instead of the output"
    )

    def build(self, site: Site) -> None:
        self.on_input = self.scales_input(site)
        self.l = nn.Parameter(torch.ones(self.count(site), dtype=site.dtype))

    def count(self, site: Site) -> int:
        return site.d_in if self.scales_input(site) else site.d_out

    def scales_input(self, site: Site) -> bool:
        return any(site.role(name) or site.path.endswith(name) for name in self.feedforward)

    def before(self, x: Tensor) -> Tensor:
        return x * self.site.inward(self.l, x) if self.on_input else x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.on_input else y * self.site.outward(self.l, y)

    def weight(self, W: Tensor) -> Tensor:
        scale = self.l.to(W.dtype)
        return W * scale if self.on_input else scale[:, None] * W

    def form(self) -> Form | None:
        if self.on_input:
            return ColumnGain(self.l)
        return Gain(self.l) if hollow(self.l) or bool(self.l.all()) else None

    def bias_of(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.on_input else self.l.to(b.dtype) * b
