from __future__ import annotations

import random
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.matrices import Diagonal, Matrix, Sparse
from inlay.core.method import DeltaMethod, option, register
from inlay.core.products import Sandwich
from inlay.core.sites import Site
from inlay.core.spectrum import svd


@register
class SVFT(DeltaMethod):
    """W′ = U (Σ + M) Vᵀ with W = U Σ Vᵀ and a sparse trained M.

    M (n, n), n = min(d_out, d_in), has one of four patterns: *plain* its diagonal, *banded* all |i − j| ≤ `band`,
    *random* as many places as that band has, without repetition, *top* those places whose singular vectors u_i and v_j
    are aligned best, by |u_iᵀv_j|. Where W is not square u_i and v_j cannot be compared, and as in the official code
    the places of the largest entries of its square factor are taken. M starts at zero, as in the paper; the official
    code starts at Kaiming-normal values times σ(g) with a trained gate g = 0, which is not the base: init "gated".
    U and V are computed from W again when an adapter is loaded, and compared with a print of those it was trained with.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Lingam et al. 2024, arXiv 2405.19597"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    learning_rate: ClassVar[float] = 5e-2

    structure: Literal["plain", "banded", "random", "top"] = option(default="plain", doc="pattern of M")
    band: int = option(default=2, doc="off-diagonals on either side; random and top take as many places", low=0)
    init: Literal["zero", "gated"] = option(default="zero", doc="M at the start: the paper's, or the official code's")
    seed: int = option(default=0, doc="seed of the random places", low=0)

    @property
    def starts_at_base(self) -> bool:
        return self.init == "zero"

    def build(self, site: Site) -> None:
        @cache
        def factors() -> tuple[Tensor, Tensor]:
            U, _, V = svd(site.weight)
            return U.to(site.dtype), V.contiguous().to(site.dtype)

        self.derived = f"svd-{site.flat_key}"
        U = site.shared(f"{self.derived}-U", lambda: factors()[0], derived=True)
        V = site.shared(f"{self.derived}-V", lambda: factors()[1], derived=True)
        n, k = min(site.shape), self.places(site)
        if self.structure != "plain":
            at = self.pattern(n, k, U, V, site.key)
            saved = self.structure in ("random", "top")  # the places of a band follow from its width
            self.register_buffer("entries", at.to(torch.int32), persistent=saved)
        gated = self.init == "gated"
        values = torch.randn(k) * (2 / k) ** 0.5 if gated else torch.zeros(k)
        self.M = nn.Parameter(values.to(site.dtype))
        self.gate = nn.Parameter(torch.zeros((), dtype=site.dtype)) if gated else None
        self.n = n

    def count(self, site: Site) -> int:
        return self.places(site) + (self.init == "gated")

    def places(self, site: Site) -> int:
        """How many entries of M are trained."""
        n = min(site.shape)
        d = 0 if self.structure == "plain" else min(self.band, n - 1)
        return n * (2 * d + 1) - d * (d + 1)

    def pattern(self, n: int, k: int, U: Tensor, V: Tensor, key: str) -> Tensor:
        """The places i·n + j (k,) of M's entries."""
        if self.structure == "banded":
            d = min(self.band, n - 1)
            return torch.tensor([i * n + j for i in range(n) for j in range(max(0, i - d), min(n, i + d + 1))])
        if self.structure == "random":
            return torch.tensor(random.Random(f"{self.seed} {key}").sample(range(n * n), k))
        square = U.T @ V if len(U) == len(V) else U if len(U) == n else V
        return square.abs().flatten().topk(k).indices

    def delta(self) -> Matrix:
        U, V = (self.site.shared_now(f"{self.derived}-{name}").to(self.M.dtype) for name in "UV")
        values = self.M if self.gate is None else self.gate.sigmoid() * self.M
        if self.structure == "plain":
            return Sandwich(U, Diagonal(values), V)
        at = self.get_buffer("entries").long()
        return Sandwich(U, Sparse(at // self.n, at % self.n, values, (self.n, self.n)), V)
