from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.matrices import LowRank
from inlay.core.method import Method, option, register
from inlay.core.sites import Site
from inlay.core.statistics import Calibrated, Components
from inlay.methods.weight.ranked import Ranked


@register
class EVA(Calibrated, Ranked):
    """W′ = W + s·B A with the rows of A the leading principal components of the inputs of W.

    `inlay.calibrate` finds them by an incremental SVD, and shares the ranks out: of the ρ·r leading components at every
    place those stay that explain the largest part of their place's variance, r per place on average; a place may be
    left with none. The scale s = α/r is that of the r asked for everywhere. A (r, d_in) has orthonormal rows, B
    (d_out, r) starts at zero, both are trained. Not calibrated, the rows of A are random, and ranks are r.
    """

    paper: ClassVar[str] = "Paischer et al. 2024, arXiv 2410.07170"
    learning_rate: ClassVar[float] = 1e-2

    rho: float = option(default=2.0, doc="ρ, ranks a place may get in units of r; 1: r everywhere", low=1.0)
    tau: float = option(
        default=0.99, doc="batches are taken until one turns components by no more than this cosine; 1: all",
        low=0.0, high=1.0,
    )  # fmt: skip
    centred: bool = option(default=True, doc="take the mean off the inputs, as a variance does (official code)")
    rank: int | None = option(default=None, doc="the rank that a calibration gave this place; r when null", low=0)

    def wanted(self, site: Site) -> int:
        """The rank asked for, as far as W has one."""
        return min(self.r, *site.shape)

    def most(self, site: Site) -> int:
        """The largest rank that the place may get."""
        return min(round(self.rho * self.wanted(site)), *site.shape)

    def plant(self, site: Site) -> None:
        r = self.wanted(site) if self.rank is None else self.rank
        A = torch.linalg.qr(torch.randn(site.d_in, r)).Q.T.contiguous()
        self.A, self.B = nn.Parameter(A.to(site.dtype)), nn.Parameter(torch.zeros(site.d_out, r, dtype=site.dtype))

    def count(self, site: Site) -> int:
        built = self._parameters.get("A")
        rank = self.wanted(site) if self.rank is None else self.rank
        return (rank if built is None else len(built)) * (site.d_in + site.d_out)

    def delta(self) -> LowRank:
        return LowRank(self.B, self.A, self.scale)

    # ------------------------------------------------------------------ calibration
    def statistic(self) -> Components:
        return Components(self.most(self.site), self.wanted(self.site), self.centred, self.tau)

    def calibrated(self, found: Mapping[Method, Any]) -> dict[str, Tensor]:
        r = self.shared_out(found)
        self.enough(found[self], r)
        A = found[self].components[:r]
        return {"A": A, "B": A.new_zeros(self.site.d_out, r)}

    def shared_out(self, found: Mapping[Method, Any]) -> int:
        """This place's share of the ranks that all places of the method have together."""
        built = [site.built[EVA] for site in self.site.peers]
        peers = [method for method in built if isinstance(method, EVA)]
        for method in peers:
            method.enough(found[method], method.wanted(method.site))
        ratios = [found[method].ratios[: method.most(method.site)].cpu() for method in peers]
        budget = sum(method.wanted(method.site) for method in peers)
        best = torch.cat(ratios).argsort(descending=True, stable=True)[:budget]
        owners = torch.repeat_interleave(torch.arange(len(peers)), torch.tensor([len(part) for part in ratios]))
        return int((owners[best] == peers.index(self)).sum())

    def specification(self) -> dict[str, Any]:
        if "_site" not in self.__dict__:
            return super().specification()
        rank = len(self.A)
        return {**super().specification(), "rank": None if rank == self.wanted(self.site) else rank}
