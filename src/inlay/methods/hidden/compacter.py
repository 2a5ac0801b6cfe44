from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inlay.core.errors import OptionError, SiteError
from inlay.core.method import option, register, uniform
from inlay.core.sites import Site
from inlay.methods.hidden.bottleneck import Activation, Bottleneck, trained

SIDES = ("down", "up")


@register
class Compacter(Bottleneck):
    """y ← y + W_up σ(W_down y + b_down) + b_up,  W = Σᵢ Aᵢ ⊗ (sᵢ tᵢ), i = 1 … n: two layers of PHM.

    Parametrised hypercomplex multiplication with sᵢ tᵢ of low rank. The n matrices Aᵢ (n, n) are one set for all places
    of the adapter, the down and the up projections alike, and trained with them; sᵢ (out/n, ρ) and tᵢ (ρ, in/n) belong
    to one projection. After attention and after the feed-forward; at the latter alone, `.on("mlp.down")`, it is
    Compacter++. The paper trains the blocks' LayerNorms as well: `[Compacter(), NormTuning()]`. By default t of W_up
    starts at zero, which is the base itself; `init="paper"` draws s and t as Xavier with gain √2 and A from
    N(0, 10⁻⁸), a start so near the base that only A ever leads away from it.
    """

    paper: ClassVar[str] = "Karimi Mahabadi et al. 2021, arXiv 2106.04647"
    where: ClassVar[tuple[str, ...]] = ("attn.o", "mlp.down")
    learning_rate: ClassVar[float] = 5e-3
    shares: ClassVar[bool] = True

    r: int = option(default=24, doc="bottleneck width, a multiple of n", low=1)
    n: int = option(default=4, doc="Kronecker products in a sum; divides all widths", low=1)
    rank: int = option(default=1, doc="ρ, rank of s t", low=1)
    shared: bool = option(default=True, doc="one set of A for all projections; otherwise one for each")
    activation: Activation = option(default="gelu", doc="non-linearity σ")
    init: Literal["zero", "paper"] = option(default="zero", doc="zero: exactly the base at start; paper: near it")

    def validate(self) -> None:
        if self.r % self.n:
            raise OptionError(f"{self.label()}: n = {self.n} does not divide the bottleneck width r = {self.r}")

    @property
    def starts_at_base(self) -> bool:
        return self.init == "zero"

    # ------------------------------------------------------------------ parameters
    def plant(self, site: Site, d_in: int, d_out: int) -> None:
        self.lengths(site, d_in, d_out)
        leads = self.shared and site.leads
        self.register_parameter("own_A", trained(self.drawn_A(), site) if leads else None)
        for side, out, into in (("down", self.r, d_in), ("up", d_out, self.r)):
            s, t = self.drawn(out, into, zero=side == "up")
            self.register_parameter(f"{side}_s", trained(s, site))
            self.register_parameter(f"{side}_t", trained(t, site))
            self.register_parameter(f"{side}_A", None if self.shared else trained(self.drawn_A(), site))
        self.leader = site.leader

    def drawn_A(self) -> Tensor:
        """A (n, n, n) at the start."""
        return torch.randn(self.n, self.n, self.n) * (1e-4 if self.init == "paper" else self.n**-0.5)

    def drawn(self, out: int, into: int, zero: bool) -> tuple[Tensor, Tensor]:
        """s (n, out/n, ρ) and t (n, ρ, in/n) of one projection at the start."""
        n, rank = self.n, self.rank
        shapes = (n, out // n, rank), (n, rank, into // n)
        if self.init == "paper":
            s, t = (uniform(shape, sqrt(12 / sum(shape[1:]))) for shape in shapes)
            return s, t
        spread = (3 * into * rank) ** -0.25  # of s and t alike, so that W spreads as nn.Linear's
        s, t = (spread * torch.randn(shape) for shape in shapes)
        return s, torch.zeros_like(t) if zero else t

    def size(self, site: Site, d_in: int, d_out: int) -> int:
        self.lengths(site, d_in, d_out)
        sets = (site.leads if self.shared else 2) * self.n**3
        return self.rank * (d_in + d_out + 2 * self.r) + sets

    def lengths(self, site: Site, *widths: int) -> None:
        """SiteError where n does not divide a width of the place."""
        for d in widths:
            if d % self.n:
                raise SiteError(f"{self.label()}: n = {self.n} does not divide the width {d} of '{site.path}'")

    # ------------------------------------------------------------------ the forward
    def matrices(self) -> tuple[Tensor, Tensor]:
        down, up = (self.hypercomplex(side) for side in SIDES)
        return down, up

    def hypercomplex(self, side: str) -> Tensor:
        """Σᵢ Aᵢ ⊗ (sᵢ tᵢ), (out, in)."""
        A = self.leader.built[Compacter].get_parameter("own_A") if self.shared else self.get_parameter(f"{side}_A")
        inner = self.get_parameter(f"{side}_s") @ self.get_parameter(f"{side}_t")
        return torch.einsum("iab,ioc->aobc", A, inner).flatten(2).flatten(0, 1)

    def adapted(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.f(y)
