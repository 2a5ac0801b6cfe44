from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from inlay.core.companion import Block, Companion, blocks_of
from inlay.core.errors import AdapterError, SiteError
from inlay.core.method import Method, option, register
from inlay.core.sites import Site

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class IST(Companion):
    """θ_l moves in the blocks l ~ σ(−I_l) of a step alone;  I_l ← I_l + μ R σ(I_l)(1 − σ(I_l)) where l was softened.

    Importance-aware sparse tuning, over any methods with places in blocks: `[LoRA(), IST()]`. At every optimizer step a
    quarter of the blocks is drawn without replacement; the tensors of the others get no gradient, so the optimizer
    leaves them and their moments alone. Every ten steps three sets of half the blocks are drawn ∝ σ(I), each set acts
    at a quarter of its strength in one more forward, and R = exp(−loss) less its mean over the three sets says
    whether that did harm: a block which was missed is trained more often from then on. I starts at zero. A block takes
    part in a quarter of the steps, so a short run wants more of them, or a higher rate.

    The losses come from `inlay.step(model, progress, optimizer, loss=…)`, on the batch at hand, where the official code
    draws other rows. What lies in no block (a head, prompts) is always trained. Under DDP:
    `find_unused_parameters=True`. Saved is what was trained, without IST.
    """

    kind: ClassVar[str] = "schedule"
    paper: ClassVar[str] = "Yao et al. 2024, arXiv 2410.11772"

    share: float = option(default=0.25, doc="share of the blocks that a step trains, one at least", low=0.0, high=1.0)
    softened: float = option(default=0.5, doc="share of the blocks that one set softens", low=0.0, high=1.0)
    sets: int = option(default=3, doc="sets whose losses are compared", low=2)
    strength_left: float = option(default=0.25, doc="strength at which softened blocks act", low=0.0, high=1.0)
    every: int = option(default=10, doc="steps between two comparisons", low=1)
    rate: float = option(default=10.0, doc="μ, the rate of the importance I", low=0.0)

    def build(self, site: Site) -> None:
        shared = [m for peer in site.peers for m in peer.built.values() if isinstance(m, Method) and m.shares]
        if shared:
            raise SiteError(f"IST trains block by block, {shared[0].label()} trains one tensor for all of them")
        self.__dict__["_blocks"] = blocks_of(site.peers)  # past nn.Module: they are owned by their own places
        if not self.blocks:
            raise SiteError("IST chooses among blocks: put a method that acts in blocks beside it, [LoRA(), IST()]")
        self.seed = torch.initial_seed()
        self.steps, self.importance = 0, [0.0] * len(self.blocks)

    @property
    def blocks(self) -> list[Block]:
        """The blocks among which is chosen."""
        return self.__dict__["_blocks"]

    # ------------------------------------------------------------------ which blocks train
    def chosen(self) -> set[int]:
        """The blocks that the coming step trains, a function of the steps taken and of I."""
        count = max(1, int(self.share * len(self.blocks)))
        return set(self.draw([sigmoid(-i) for i in self.importance], count, "train"))

    def ready(self) -> None:
        chosen = self.chosen()
        for i, block in enumerate(self.blocks):
            block.let_train(i in chosen)

    def draw(self, weights: list[float], count: int, purpose: str) -> list[int]:
        """`count` different blocks, one after the other ∝ weight; the same for the same seed, step and purpose."""
        chance = random.Random(f"{self.seed} {self.steps} {purpose}")
        arrival = [chance.expovariate(weight) for weight in weights]  # the first of such clocks to ring is i ∝ weight
        return sorted(sorted(range(len(weights)), key=arrival.__getitem__)[:count])

    # ------------------------------------------------------------------ what blocks are worth
    def step(self, progress: float, optimizer: Optimizer | None) -> None:
        self.steps += 1

    def probe(self, loss: Callable[[], float] | None) -> None:
        if self.steps % self.every == 0:
            self.compare(loss)
        self.ready()  # a compiled forward does not ask

    def compare(self, loss: Callable[[], float] | None) -> None:
        """Soften one set of blocks after the other and move I by what that does to the loss."""
        if loss is None:
            raise AdapterError("IST compares losses: give inlay.step a function that computes one, loss=lambda: …")
        odds = [sigmoid(i) for i in self.importance]
        sets = self.some(odds)
        rewards = [math.exp(-self.softly(chosen, loss)) for chosen in sets]
        mean = sum(rewards) / len(rewards)
        for chosen, reward in zip(sets, rewards, strict=True):
            for i in chosen:
                self.importance[i] += self.rate * (reward - mean) * odds[i] * (1 - odds[i])

    def some(self, odds: list[float]) -> list[list[int]]:
        """The sets to soften, all different."""
        n = len(self.blocks)
        size = min(n, max(1, int(self.softened * n)))
        wanted = min(self.sets, math.comb(n, size))
        found: list[list[int]] = []
        attempt = 0
        while len(found) < wanted:
            drawn = self.draw(odds, size, f"soften {attempt}")
            found += [drawn] if drawn not in found else []
            attempt += 1
        return found

    def softly(self, chosen: list[int], loss: Callable[[], float]) -> float:
        """The loss with some blocks' methods at a part of their strength."""
        try:
            for i in chosen:
                self.blocks[i].strengthen(self.strength_left)
            return loss()
        finally:
            for i in chosen:
                self.blocks[i].strengthen(1.0)

    # ------------------------------------------------------------------ kill and resume
    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.steps, *self.importance], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        steps, *self.importance = state.tolist()
        self.steps = int(steps)


def sigmoid(x: float) -> float:
    """σ(x)."""
    return 0.5 * (1 + math.tanh(x / 2))
