from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.errors import AdapterError, OptionError
from inlay.core.matrices import LowRank
from inlay.core.method import DeltaMethod, option, register
from inlay.core.sites import Site

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class AdaLoRA(DeltaMethod):
    """W′ = W + (α/r) P diag(E) Q, the least important of all sites' triplets (P_i, E_i, Q_i) zeroed to a budget.

    P (d_out, r) and Q (r, d_in) start N(0, 0.02²), E (r,) at zero. The triplets kept fall from r to `target` per site
    on average: all until the share `start` of the run, then along a cubic until `end` of it is left, and the same ones
    from there. A number's importance is Ī·Ū, smoothed |p ∂L/∂p| times its smoothed deviation; a triplet's is that of
    E_i plus the means over P_i and Q_i. What is zeroed may grow back while the budget falls. The penalty
    ½ mean ‖PᵀP − I‖, ‖QQᵀ − I‖ keeps triplets apart. A saved adapter holds the surviving triplets alone.
    """

    kind: ClassVar[str] = "schedule"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2303.10512"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 2e-2
    of_a_run: ClassVar[tuple[str, ...]] = ("sensitivity_", "uncertainty_")

    r: int = option(default=12, doc="triplets at the start", low=1)
    target: int = option(default=8, doc="triplets per site at the end, on average", low=1)
    alpha: float = option(default=12.0, doc="scale numerator α", low=0.0)
    start: float = option(default=0.1, doc="share of the run before the budget falls", low=0.0, high=1.0)
    end: float = option(default=0.3, doc="share of the run after it has fallen", low=0.0, high=1.0)
    beta1: float = option(default=0.85, doc="smoothing of the sensitivity Ī", low=0.0, high=1.0)
    beta2: float = option(default=0.85, doc="smoothing of the uncertainty Ū", low=0.0, high=1.0)
    orthogonality: float = option(default=0.5, doc="factor of the penalty", low=0.0)
    initial: int = option(default=0, doc="the r that α is divided by, where it is not this one; 0: r", low=0)

    def validate(self) -> None:
        if not self.initial and self.target > self.r:
            raise OptionError(f"AdaLoRA cannot grow from {self.r} to {self.target} triplets: target is at most r")
        if self.start + self.end > 1:
            raise OptionError(f"start and end are shares of one run: {self.start} + {self.end} is more than all of it")

    def build(self, site: Site) -> None:
        self.P = nn.Parameter((0.02 * torch.randn(site.d_out, self.r)).to(site.dtype))
        self.E = nn.Parameter(torch.zeros(self.r, dtype=site.dtype))
        self.Q = nn.Parameter((0.02 * torch.randn(self.r, site.d_in)).to(site.dtype))
        for name, p in list(self.named_parameters()):
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(p, requires_grad=False))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(p, requires_grad=False))
        self.kept = [True] * self.r

    def count(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out + 1)

    def delta(self) -> LowRank:
        return LowRank(self.P * self.E, self.Q, self.alpha / (self.initial or self.r))

    def triplets(self) -> int:
        return self.r

    @torch.no_grad()
    def begin_at(self, U: Tensor, S: Tensor, V: Tensor) -> None:
        r = len(S)
        self.E.zero_()
        self.P[:, :r], self.E[:r], self.Q[:r] = U, S / self.delta().scale, V.T

    def penalty(self) -> Tensor:
        return self.orthogonality * (apart(self.P.T) + apart(self.Q)) / (2 * len(self.site.peers))

    # ------------------------------------------------------------------ the budget
    def step(self, progress: float, optimizer: Optimizer | None) -> None:
        self.measure()
        if self.site.peers[-1] is not self.site:
            return
        sites = self.companions()
        if progress < 1 - self.end:
            scores = torch.cat([method.scores() for method in sites])
            best = set(scores.topk(self.budget(progress, sites)).indices.tolist())
            kept = iter(range(len(scores)))
            for method in sites:
                method.kept = [next(kept) in best for _ in method.kept]
        with torch.no_grad():
            for method in sites:
                method.E.mul_(torch.tensor(method.kept, device=method.E.device))

    def companions(self) -> list[AdaLoRA]:
        """This method at all its sites, which share one budget."""
        built = [site.built[AdaLoRA] for site in self.site.peers]
        return [method for method in built if isinstance(method, AdaLoRA)]

    def budget(self, progress: float, sites: list[AdaLoRA]) -> int:
        """Triplets to keep in all: b_T + (b_0 − b_T) (1 − t)³, t from 0 to 1 while the budget falls."""
        full, final = sum(method.r for method in sites), sum(min(method.target, method.r) for method in sites)
        falling = 1 - self.start - self.end
        t = 1.0 if falling <= 0 else min(1.0, max(0.0, (progress - self.start) / falling))
        return int(final + (full - final) * (1 - t) ** 3)

    @torch.no_grad()
    def measure(self) -> None:
        """Ī ← β₁ Ī + (1 − β₁) |p ∂L/∂p|,  Ū ← β₂ Ū + (1 − β₂) |I − Ī|."""
        if self.resting:  # without gradients there is nothing new to learn
            return
        for name, p in self.named_parameters():
            if p.grad is None:
                raise AdapterError(
                    "AdaLoRA weighs gradients: call inlay.step after optimizer.step() and before zero_grad()"
                )
            now = (p * p.grad).abs()
            mean, spread = self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")
            mean.lerp_(now, 1 - self.beta1)
            spread.lerp_((now - mean).abs(), 1 - self.beta2)

    def scores(self) -> Tensor:
        """The importance of every triplet, (r,)."""
        P, E, Q = (self.get_buffer(f"sensitivity_{n}") * self.get_buffer(f"uncertainty_{n}") for n in "PEQ")
        return E + P.mean(0) + Q.mean(1)

    # ------------------------------------------------------------------ files
    def survivors(self) -> list[int]:
        """The triplets a file holds: those that are kept, and one (of E = 0) where none is."""
        return [i for i, kept in enumerate(self.kept) if kept] or [0]

    def stored(self) -> dict[str, Tensor]:
        alive = self.survivors()
        return {"P": self.P[:, alive], "E": self.E[alive], "Q": self.Q[alive]}

    def specification(self) -> dict:
        if "_site" not in self.__dict__:
            return super().specification()
        return {**super().specification(), "r": len(self.survivors()), "initial": self.initial or self.r}

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.kept)

    def set_extra_state(self, state: Tensor) -> None:
        self.kept = state.tolist()


def apart(Q: Tensor) -> Tensor:
    """‖Q Qᵀ − I‖, Frobenius."""
    return (Q @ Q.T - torch.eye(len(Q), dtype=Q.dtype, device=Q.device)).norm()
