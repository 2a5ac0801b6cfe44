"""What methods share that take a part of W out, train it, and leave the base as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inlay.core.errors import OptionError
from inlay.core.matrices import LowRank
from inlay.core.sites import Site
from inlay.methods.weight.ranked import Ranked


class Residual(Ranked):
    """ΔW = s (B A − B₀A₀), computed as s ((B − B₀) A + B₀ (A − A₀)).

    That is zero to the bit at the start, and loses no small difference in bfloat16. It is a LoRA of rank 2r.
    """

    def validate(self) -> None:
        if not self.alpha:
            raise OptionError(f"{self.label()}: with alpha=0 no update is left, and Σ/s has no value")

    def take_out(self, site: Site, B: Tensor, A: Tensor) -> None:
        """Make B (d_out, r) and A (r, d_in), and B₀ and A₀ from the same numbers."""
        for name, t in (("A", A), ("B", B)):
            start = t.to(site.dtype).contiguous()
            self.register_parameter(name, nn.Parameter(start))
            self.register_buffer(f"{name}0", start.clone())

    def count(self, site: Site) -> int:
        return min(self.r, *site.shape) * (site.d_in + site.d_out)

    def delta(self) -> LowRank:
        A, B = self.tensor("A"), self.tensor("B")
        A0, B0 = self.get_buffer("A0"), self.get_buffer("B0")
        return LowRank(torch.cat([B - B0, B0], 1), torch.cat([A, A - A0]), self.scale)
