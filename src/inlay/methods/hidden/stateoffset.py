from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.errors import SiteError
from inlay.core.method import HiddenMethod, option, register, uniform
from inlay.core.sites import Site


@register
class StateOffset(HiddenMethod):
    """y_t ← y_t + C_t h′ before the gate, out = y_t ⊙ silu(z_t), in every state space layer.

    h′ (d_inner, N) is an offset of each channel's state, the same at every token. It is read out by the layer's own C_t
    and never fed back into the recurrence h_t = Ā_t h_{t−1} + B̄_t u_t, so that it neither fades nor builds up, and a
    scan over a whole sequence gives what steps with a cache give. With `offset="y"` the output itself is moved,
    y_t ← y_t + y′ with y′ (d_inner,). Both start at zero. It acts where the output projection reads its input, on the
    z_t and C_t that the layer's other projections put out in the same forward, with whatever adapts them. No tensor of
    the layer stands for an offset before the gate, so it cannot be merged; it costs next to nothing to keep.
    """

    paper: ClassVar[str] = "Kang et al. 2025, arXiv 2503.03499"
    where: ClassVar[tuple[str, ...]] = ("mixer.out",)
    architecture: ClassVar[str] = "mamba"
    hears: ClassVar[tuple[str, ...]] = ("mixer.z", "mixer.C")
    learning_rate: ClassVar[float] = 3e-2

    offset: Literal["h", "y"] = option(default="h", doc="what is moved: the state, or the output before the gate")
    r: int = option(default=0, doc="rank of h′ = B A, B (d_inner, r) at zero and A (r, N); 0: h′ in full", low=0)

    def build(self, site: Site) -> None:
        if not site.role("mixer.out"):
            raise SiteError(f"{self.label()} acts where 'mixer.out' reads its input, not at '{site.path}'")
        d, N = self.sizes(site)
        if self.offset == "y" or not self.r:
            self.value = nn.Parameter(torch.zeros((d, N) if self.offset == "h" else (d,), dtype=site.dtype))
        else:
            self.B = nn.Parameter(torch.zeros(d, self.r, dtype=site.dtype))
            self.A = nn.Parameter(uniform((self.r, N), N**-0.5).to(site.dtype))

    def sizes(self, site: Site) -> tuple[int, int]:
        """(d_inner, N); N is 1 where no state is moved."""
        states = site.hears["mixer.C"].rows
        assert states is not None
        return site.d_in, states.count if self.offset == "h" else 1

    def count(self, site: Site) -> int:
        """d_inner·N for h′, r (d_inner + N) where it has a rank, d_inner for y′."""
        d, N = self.sizes(site)
        return self.r * (d + N) if self.offset == "h" and self.r else d * N

    def before(self, x: Tensor) -> Tensor:
        gate = F.silu(self.site.heard("mixer.z"))
        if self.offset == "y":
            moved: Tensor = self.value
        else:
            C = self.site.heard("mixer.C")
            moved = F.linear(C, (self.B @ self.A if self.r else self.value).to(C.dtype))
        return x + (gate * moved).to(x.dtype)
