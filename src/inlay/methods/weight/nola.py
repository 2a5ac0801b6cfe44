from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.core.matrices import LowRank
from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.methods.weight.ranked import Ranked


@register
class NOLA(Ranked):
    """W′ = W + s·B A,  A = A₀ + Σ_i a_i A_i,  B = Σ_j b_j B_j, with random frozen A_i and B_j.

    Only the coefficients a and b, `bases` numbers each, are trained and stored; they start at zero. The bases, with
    entries U(±1/√bases), and A₀ (Kaiming-uniform, from the official code: without it b would start with no gradient)
    are drawn from `seed` on the CPU and exist once per model: a site uses the leading d_in and d_out of them, where
    the official code draws them for each layer.
    """

    paper: ClassVar[str] = "Koohpayegani et al. 2023, arXiv 2310.02556"
    learning_rate: ClassVar[float] = 1e-2

    bases: int = option(default=512, doc="random matrices per factor, k = l", low=1)
    seed: int = option(default=0, doc="seed of the bases", low=0)

    def build(self, site: Site) -> None:
        wide, tall = max(s.d_in for s in site.peers), max(s.d_out for s in site.peers)
        meta = site.parameter_device.type == "meta"
        self.drawn = f"nola-{self.seed}-{self.bases}-{self.r}-{tall}x{wide}"
        bound = self.bases**-0.5
        site.shared(f"{self.drawn}-A", lambda: draw(3 * self.seed, (wide, self.r, self.bases), bound, meta))
        site.shared(f"{self.drawn}-B", lambda: draw(3 * self.seed + 1, (tall, self.r, self.bases), bound, meta))
        site.shared(f"{self.drawn}-A0", lambda: draw(3 * self.seed + 2, (wide, self.r), 1.0, meta))
        self.a, self.b = (nn.Parameter(torch.zeros(self.bases, dtype=site.dtype)) for _ in range(2))
        self.shape = site.shape

    def count(self, site: Site) -> int:
        return 2 * self.bases

    def delta(self) -> LowRank:
        return self.once("delta", self.mixed)  # as large as a LoRA

    def mixed(self) -> LowRank:
        d_out, d_in = self.shape
        A0 = self.leading("A0", d_in) * d_in**-0.5
        return LowRank(self.leading("B", d_out) @ self.b, (A0 + self.leading("A", d_in) @ self.a).T, self.scale)

    def leading(self, name: str, d: int) -> Tensor:
        """The part of a shared tensor that a width of d uses."""
        return self.site.shared_now(f"{self.drawn}-{name}")[:d].to(self.a.dtype)


def draw(seed: int, shape: tuple[int, ...], bound: float, meta: bool) -> Tensor:
    """U(±bound) from a CPU generator of its own."""
    generator = None if meta else torch.Generator("cpu").manual_seed(seed)
    return torch.empty(shape, device="meta" if meta else "cpu").uniform_(-bound, bound, generator=generator)
