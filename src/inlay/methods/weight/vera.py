from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.errors import OptionError
from inlay.core.hosts import LinearHost
from inlay.core.matrices import LowRank
from inlay.core.method import DeltaMethod, option, register
from inlay.core.sites import Site


@register
class VeRA(DeltaMethod):
    """W′ = W + diag(b) B diag(d) A with A, B random, frozen and shared by all sites.

    A (r, max d_in) and B (max d_out, r) are drawn from `seed` on the CPU, Kaiming-uniform with bound √(6/fan_in); a
    site uses the leading columns of A and rows of B. Only d (r,) and b (d_out,) are trained and stored.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Kopiczko, Blankevoort & Asano 2023, arXiv 2310.11454"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 3e-2

    r: int = option(default=256, doc="rank of the shared projections", low=1)
    d_initial: float = option(default=0.1, doc="start of every entry of d")
    seed: int = option(default=0, doc="seed of the shared projections", low=0)
    projections: str = option(default="", doc="digest of projections that came with a file; empty: drawn from `seed`")

    def build(self, site: Site) -> None:
        wide, tall = max(s.d_in for s in site.peers), max(s.d_out for s in site.peers)
        name = f"vera-{self.projections or f'{self.seed}-{self.r}-{tall}x{wide}'}"
        meta = site.parameter_device.type == "meta"
        site.shared(f"{name}-A", lambda: self.draw(wide, tall, meta)[0])
        site.shared(f"{name}-B", lambda: self.draw(wide, tall, meta)[1])
        self.drawn = name
        self.d = nn.Parameter(torch.full((self.r,), self.d_initial, dtype=site.dtype))
        self.b = nn.Parameter(torch.zeros(site.d_out, dtype=site.dtype))
        self.shape = site.shape

    def count(self, site: Site) -> int:
        return self.r + site.d_out

    def draw(self, wide: int, tall: int, meta: bool) -> tuple[Tensor, Tensor]:
        """The shared projections, where they were not given."""
        if self.projections:
            raise OptionError(
                f"{self.label()}: projections named by a digest come with a saved adapter: load it, or give a seed"
            )
        return projections(self.seed, self.r, wide, tall, meta)

    @property
    def A(self) -> Tensor:
        """(r, d_in), frozen."""
        return self.site.shared_now(f"{self.drawn}-A")[:, : self.shape[1]]

    @property
    def B(self) -> Tensor:
        """(d_out, r), frozen."""
        return self.site.shared_now(f"{self.drawn}-B")[: self.shape[0]]

    def delta(self) -> LowRank:
        return LowRank(self.b[:, None] * self.B, self.d[:, None] * self.A)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.few(x):
            return self.site.add(self.delta(), self.drop(x), y)
        h = F.linear(x, self.A.to(x.dtype)) * self.d.to(x.dtype)
        return y + F.linear(h, self.B.to(x.dtype)) * self.b.to(x.dtype)

    def few(self, x: Tensor) -> bool:
        """Whether d and b scale fewer numbers in what becomes of x than in A and B, while nothing trains."""
        if torch.is_grad_enabled() or self.training or not isinstance(self.site.host, LinearHost):
            return False
        d_out, d_in = self.shape
        return x.numel() // d_in * (self.r + d_out) < self.r * (d_in + d_out)


def projections(seed: int, r: int, wide: int, tall: int, meta: bool = False) -> tuple[Tensor, Tensor]:
    """A (r, wide) then B (tall, r) from one CPU generator, U(±√(6/fan_in))."""
    device = "meta" if meta else "cpu"
    generator = None if meta else torch.Generator("cpu").manual_seed(seed)
    A = torch.empty(r, wide, device=device).uniform_(-((6 / wide) ** 0.5), (6 / wide) ** 0.5, generator=generator)
    B = torch.empty(tall, r, device=device).uniform_(-((6 / r) ** 0.5), (6 / r) ** 0.5, generator=generator)
    return A, B
