from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.errors import AdapterError, OptionError, SiteError
from inlay.core.matrices import LowRank
from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.core.statistics import starts_from_data
from inlay.methods.schedule.nested import OverLowRank

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class ReLoRA(OverLowRank):
    """W′ = W + Σ_c s·B_c A_c: a low-rank update is trained, frozen into W, and begun anew, c times.

    The run is cut into `restarts` + 1 equal cycles. At the end of one its B_c A_c is set aside, which the base need not
    move for, and A, B start again as they first did. Most of the optimizer's moments are then zeroed, so that the new
    update does not go on in the old direction, and steps grow from 0 to their full length within `warmup` steps (the
    paper's jagged schedule). The final rank is (restarts + 1) r. The paper's full-rank warm start is a run of `full`.
    """

    paper: ClassVar[str] = "Lialin et al. 2023, arXiv 2307.05695"

    of_a_run: ClassVar[tuple[str, ...]] = ("before_", "since")

    restarts: int = option(default=3, doc="times the update begins anew", low=1)
    warmup: int = option(default=10, doc="steps after a restart until steps have their full length", low=0)
    prune: float = option(
        default=0.999, doc="share of the optimizer's moments that a restart zeroes", low=0.0, high=1.0
    )
    prune_by: Literal["random", "magnitude"] = option(default="random", doc="which moments: any, or the smallest")

    def validate(self) -> None:
        super().validate()
        if starts_from_data(self.of):
            raise OptionError(f"ReLoRA begins its update anew, without the data that {self.of.label()} starts from")

    def build(self, site: Site) -> None:
        first, bias = self.inner(), site.bias
        if self.of.bias_of(bias) is not bias:
            raise SiteError(f"{self.label()} begins B A anew, not a bias: leave the bias of {self.of.label()} out")
        d_out, d_in = first.shape
        self.register_buffer("frozen_B", first.B.new_zeros(d_out, self.restarts * first.rank))
        self.register_buffer("frozen_A", first.A.new_zeros(self.restarts * first.rank, d_in))
        self.register_buffer("cycle", torch.tensor(0))
        self.register_buffer("since", torch.tensor(self.warmup))  # steps since the last restart
        for i, p in enumerate(self.of.parameters()):
            self.register_buffer(f"before_{i}", p.detach().clone())

    def delta(self) -> LowRank:
        now = self.inner()
        B = torch.cat([self.get_buffer("frozen_B"), now.scale * now.B], 1)
        return LowRank(B, torch.cat([self.get_buffer("frozen_A"), now.A]))

    @torch.no_grad()
    def step(self, progress: float, optimizer: Optimizer | None) -> None:
        since, cycle = self.get_buffer("since"), self.get_buffer("cycle")
        if since < self.warmup:
            since += 1
            for i, p in enumerate(self.of.parameters()):
                before = self.get_buffer(f"before_{i}")
                p.copy_(before.lerp(p, float(since) / self.warmup))
                before.copy_(p)
        if cycle < self.restarts and progress >= (int(cycle) + 1) / (self.restarts + 1):
            self.restart(optimizer)

    def restart(self, optimizer: Optimizer | None) -> None:
        """Set B_c A_c aside, begin anew, and let the optimizer forget."""
        if optimizer is None:
            raise AdapterError("ReLoRA zeroes moments when it restarts: give inlay.step the optimizer")
        now, cycle = self.inner(), self.get_buffer("cycle")
        at = slice(int(cycle) * now.rank, (int(cycle) + 1) * now.rank)
        self.get_buffer("frozen_B")[:, at] = now.scale * now.B
        self.get_buffer("frozen_A")[at] = now.A
        cycle += 1
        self.get_buffer("since").zero_()
        # a seed of its own, so that processes that train together, and a resumed run, begin alike
        seed = zlib.crc32(f"{self.site.key} {int(cycle)}".encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = self.of.afresh()
            for i, (p, q) in enumerate(zip(self.of.parameters(), fresh.parameters(), strict=True)):
                p.copy_(q)
                self.get_buffer(f"before_{i}").copy_(q)
                self.forget(p, optimizer)

    def forget(self, p: nn.Parameter, optimizer: Optimizer) -> None:
        """Zero a share of each moment of p."""
        for moment in optimizer.state[p].values():
            if isinstance(moment, Tensor) and moment.shape == p.shape:
                order = torch.rand(p.shape).to(p.device) if self.prune_by == "random" else moment.abs()
                count = round(self.prune * p.numel())
                moment.view(-1)[order.flatten().argsort()[:count]] = 0
