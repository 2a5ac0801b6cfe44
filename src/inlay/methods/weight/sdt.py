from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.errors import CalibrationError, SiteError
from inlay.core.matrices import Sparse
from inlay.core.method import Method, Placement, WeightMethod, option, register
from inlay.core.sites import Site
from inlay.core.statistics import Calibrated, Gradient
from inlay.methods.weight.lora import LoRA

STATE, PROJECTIONS = "mixer.A", ("mixer.B", "mixer.C")


@register
class SDT(Calibrated, WeightMethod):
    """log A′ = log A + Δ on the most important states of few channels; W_B, W_C + Δ on those channels; LoRA at the end.

    Sparse dimension tuning of state space layers. Of the d_inner channels all but the share `freeze_channels` are
    chosen, the same for A, B and C of a layer, and of the N states of each chosen one all but `freeze_states`. There
    A (as its logarithm) has an update of its own number by number, and the columns of the projections to B_t and C_t
    that read a chosen channel have one for all their N rows. Updates start at zero. LoRA of rank `r` on `mixer.out` is
    part of it (0: none, which it takes to give it places of one's own).

    A number's importance is the square of what training would change of log A: `inlay.calibrate` sums its gradients
    over some batches, as a plain gradient descent would; a channel's is the sum over its states. The paper takes the
    change after a warm-up of some hundred AdamW steps, in which LoRA learns as well, and trains anew from there; here
    nothing has to be undone, and the choice differs. Without calibration channels are spread evenly and their slowest
    states taken.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Galim et al. 2024, arXiv 2410.09016"
    where: ClassVar[tuple[str, ...]] = (STATE, *PROJECTIONS)
    architecture: ClassVar[str] = "mamba"
    learning_rate: ClassVar[float] = 3e-2
    wants_gradient: ClassVar[bool] = True

    freeze_channels: float = option(default=0.99, doc="share of the channels that stay as they are", low=0.0, high=1.0)
    freeze_states: float = option(default=0.9, doc="share of the states, in a chosen channel", low=0.0, high=1.0)
    r: int = option(default=8, doc="rank of LoRA on mixer.out; 0 for none", low=0)
    alpha: float = option(default=8.0, doc="scale numerator α of LoRA", low=0.0)
    dropout: float = option(default=0.0, doc="dropout on the input of LoRA (the paper's is 0.1)", low=0.0, high=1.0)

    def beside(self) -> tuple[Placement, ...]:
        lora = LoRA(r=max(1, self.r), alpha=self.alpha, dropout=self.dropout)
        return (lora.on("mixer.out"),) if self.r else ()

    # ------------------------------------------------------------------ sizes
    def on_state(self, site: Site) -> bool:
        """Whether the site is A, rather than the projection to B_t or C_t."""
        if not any(site.role(name) for name in self.where):
            raise SiteError(
                f"{self.label()} chooses channels of a state space, at {', '.join(self.where)}: '{site.path}' is none"
            )
        return site.role(STATE)

    def chosen(self, site: Site) -> tuple[int, int]:
        """How many channels are chosen, and how many numbers each has here."""
        if self.on_state(site):
            return left(site.d_out, self.freeze_channels), left(site.d_in, self.freeze_states)
        return left(site.d_in, self.freeze_channels), site.d_out

    def count(self, site: Site) -> int:
        """k·s on A, N·k on B and on C, for k chosen channels of s chosen states; LoRA beside it counts its own."""
        k, n = self.chosen(site)
        return k * n

    # ------------------------------------------------------------------ the update
    def plant(self, site: Site) -> None:
        k, n = self.chosen(site)
        d = site.d_out if self.on_state(site) else site.d_in
        self.register_buffer("channels", torch.arange(k) * d // k)
        self.register_buffer("numbers", torch.arange(n).repeat(k, 1))
        self.value = nn.Parameter(torch.zeros(k, n, dtype=site.dtype))

    def delta(self) -> Sparse:
        """Δ, (d_inner, N) for A and (N, d_inner) for the others."""
        numbers = self.get_buffer("numbers")
        channels = self.get_buffer("channels")[:, None].expand_as(numbers)
        rows, cols = (channels, numbers) if self.on_state(self.site) else (numbers, channels)
        return Sparse(rows.flatten(), cols.flatten(), self.value.flatten(), self.site.shape)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta().dense().to(W.dtype)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.site.add(self.delta(), x, y)

    def update(self) -> Sparse:
        return self.delta()

    # ------------------------------------------------------------------ the choice
    def statistic(self) -> Gradient:
        return Gradient()

    def calibrated(self, found: Mapping[Method, Any]) -> dict[str, Tensor]:
        source = next((m for m in found if isinstance(m, SDT) and m.same_layer(self) and m.on_state(m.site)), self)
        scores = source.scores(found[source])
        k, n = self.chosen(self.site)
        channels = scores.sum(1).topk(k).indices.sort().values
        own = scores[channels] if self.on_state(self.site) else scores.new_zeros(k, n)
        return {"channels": channels, "numbers": own.topk(n, 1).indices.sort(1).values}

    def same_layer(self, other: SDT) -> bool:
        """Whether two built copies are parts of one layer."""
        here, there = (m.site.name.rpartition(".")[0] for m in (self, other))
        return here == there

    def scores(self, found: Gradient) -> Tensor:
        """The importance of every number by channel, (d_inner, N)."""
        assert found.total is not None
        scores = self.site.part_of(found.total).square()
        if not scores.any():
            raise CalibrationError(f"the loss does not depend on '{self.site.key}': nothing could be chosen there")
        return scores if self.on_state(self.site) else scores.T


def left(size: int, frozen: float) -> int:
    """How many of `size` remain when a share is frozen, rounded as the paper's code does; at least one."""
    return max(1, size - round(frozen * size))
