"""Dynamic logits fusion: how far to follow each expert is decided anew at every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.core.errors import OptionError
from inlay.fusion.rule import Pair, Rule, shift


@dataclass(frozen=True)
class DynamicFusion(Rule):
    """s = z + Σ_t w_t (z_t⁺ − z_t⁻), w = argmin Σ_t [KL(P̃‖P) − KL(Q_t‖Q)]² + [KL(P‖P̃) − KL(Q‖Q_t)]².

    The fused P̃ shall be as far from the large model P as tuning took the small expert Q_t from its base Q. Fan et al.
    2024, arXiv 2406.15480. How the minimum is found is not published with code: here each w_t is searched on an even
    grid of [0, most], then twice more on grids ten times finer around the best. The strength α of an expert multiplies
    the weight that was found, so 0 leaves an expert out.

    Args:
        most: largest weight.
        together: let several experts have a weight in one step, found by turns over the experts until they settle; by
            default the single best one has, which is the paper's faster form for several tasks.
    """

    most: float = 2.0
    together: bool = False

    def __post_init__(self) -> None:
        if not self.most > 0:
            raise OptionError(f"DynamicFusion: most is the largest weight, above 0, got {self.most}")

    def filtered(self, z: Tensor) -> Tensor:
        return z

    def weights(self, z: Tensor, pairs: Sequence[Pair], alphas: Sequence[float]) -> Tensor:
        heard = [t for t, alpha in enumerate(alphas) if alpha]
        search = Search(z, [pairs[t] for t in heard], [alphas[t] for t in heard], self.most)
        found = search.together() if self.together else search.single()
        w = torch.zeros(len(alphas), z.shape[0], dtype=z.dtype, device=z.device)
        for t, w_t in zip(heard, found, strict=True):
            w[t] = alphas[t] * w_t
        return w


POINTS, ROUNDS, TURNS = 21, 3, 4
"""Points of a grid, grids each a tenth as wide as the one before, turns over several experts."""


class Search:
    """The weights of one step, for every row by itself."""

    def __init__(self, z: Tensor, pairs: Sequence[Pair], alphas: Sequence[float], most: float) -> None:
        self.z, self.pairs, self.most = z, pairs, most
        self.log_p = z.log_softmax(-1)
        self.alphas = torch.tensor(alphas, dtype=z.dtype, device=z.device)
        self.shifts = [divergences(q_t.log_softmax(-1), q.log_softmax(-1)) for q_t, q in pairs]

    def objective(self, w: Tensor) -> Tensor:
        """The sum over experts for weights (experts, points, rows), giving (points, rows)."""
        fused = (self.z + shift(self.pairs, self.alphas[:, None, None] * w)).log_softmax(-1)
        there, back = divergences(fused, self.log_p)
        return sum(((there - a).square() + (back - b).square() for a, b in self.shifts), torch.zeros_like(there))

    def along(self, w: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """(the best weight of expert t where the others have theirs, its objective), both (rows,)."""
        middle, half = torch.full_like(w[t], self.most / 2), self.most / 2
        best = torch.empty_like(middle)
        for _ in range(ROUNDS):
            steps = torch.linspace(-half, half, POINTS, dtype=w.dtype, device=w.device)
            tried = (middle + steps[:, None]).clamp(0, self.most)
            whole = w[:, None].repeat(1, POINTS, 1)
            whole[t] = tried
            best, at = self.objective(whole).min(0)
            middle, half = tried.gather(0, at[None])[0], half / 10
        return middle, best

    def single(self) -> Tensor:
        """The one best expert of each row, the others at 0."""
        zero = torch.zeros(len(self.pairs), self.z.shape[0], dtype=self.z.dtype, device=self.z.device)
        found, values = zip(*(self.along(zero, t) for t in range(len(self.pairs))), strict=True)
        first = torch.stack(values).min(0).indices
        return zero.scatter(0, first[None], torch.stack(found).gather(0, first[None]))

    def together(self) -> Tensor:
        """All experts, each in turn."""
        w = self.single()
        for _ in range(TURNS if len(w) > 1 else 0):
            for t in range(len(w)):
                w[t] = self.along(w, t)[0]
        return w


def divergences(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """KL(a‖b) and KL(b‖a) of log-probabilities; a token that is impossible under both adds nothing."""
    difference = torch.where(a.isinf() & b.isinf(), 0, a - b)
    there = torch.where(a.isinf(), 0, a.exp() * difference).sum(-1)
    back = torch.where(b.isinf(), 0, b.exp() * -difference).sum(-1)
    return there, back
