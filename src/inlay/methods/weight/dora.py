from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.core.lean import Form, RowScaled
from inlay.core.method import DeltaMethod, WeightMethod, option, register
from inlay.core.sites import Site
from inlay.methods.weight.lora import LoRA


@register
class DoRA(WeightMethod):
    """W′ = m ⊙ (W + ΔW) / ‖W + ΔW‖, row by row, ΔW of any method with a delta.

    m (d_out,) starts at the row norms of W. As in the paper's section 4.3 the norm is not differentiated. The norm of
    W + ΔW comes from ‖W‖², ⟨W, ΔW⟩ and ‖ΔW‖², so W + ΔW is not formed. `DoRA(of=VeRA())` is DVoRA. For an embedding
    table a row is one of the d dimensions, across the vocabulary; for a convolution one output channel.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv 2402.09353"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 3e-3
    reads_weight: ClassVar[bool] = True

    of: DeltaMethod = option(default=LoRA(), doc="the directional update")

    def build(self, site: Site) -> None:
        self.measure(site)
        self.m = nn.Parameter(self.get_buffer("squares").sqrt().to(site.dtype))

    def measure(self, site: Site) -> None:
        """Take ‖W_i‖²; W never moves."""
        W = site.weight
        squares = W.to(torch.promote_types(W.dtype, site.dtype)).square().sum(1)
        self.register_buffer("squares", squares, persistent=False)

    @property
    def starts_at_base(self) -> bool:
        return self.of.starts_at_base

    def count(self, site: Site) -> int:
        return self.of.count(site) + site.d_out

    def triplets(self) -> int:
        return self.of.triplets()

    def begin_at(self, U: Tensor, S: Tensor, V: Tensor) -> None:
        self.of.begin_at(U, S, V)
        self.measure(self.site)  # of the base as it is now; m stays at the norms of W, which W + ΔW is to come near

    def ratio(self) -> Tensor:
        """m / ‖W + ΔW‖, (d_out,), gradient through m alone; measured once while nothing trains."""
        return self.once("ratio", self.measured)

    def measured(self) -> Tensor:
        W = self.site.weight
        squares = (
            self.of.delta().squared_row_norms(W.to(self.m.dtype), self.get_buffer("squares").to(self.m.dtype)).detach()
        )
        return self.m / squares.clamp_min(1e-30).sqrt()

    def weight(self, W: Tensor) -> Tensor:
        return self.ratio().to(W.dtype)[:, None] * self.of.weight(W)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        c, bias = self.site.outward(self.ratio(), y), self.site.current_bias
        delta = self.of.thin(self.of.delta())
        if bias is None:
            return c * self.site.add(delta, self.of.drop(x), y)
        y = y - self.site.outward(bias, y)  # neither the bias nor its update is scaled
        after = self.of.bias_of(bias)
        assert after is not None
        return c * self.site.add(delta, self.of.drop(x), y) + self.site.outward(after, y)

    def form(self) -> Form | None:
        b = self.site.bias
        return None if self.of.thins() or self.bias_of(b) is not b else RowScaled(self.ratio(), self.of.delta())

    def bias_of(self, b: Tensor | None) -> Tensor | None:
        return self.of.bias_of(b)

    def exact_now(self) -> bool:
        return self.of.exact_now()
