"""What every rule of logits fusion is: s = f(z) + Σ_t w_t (z_t⁺ − z_t⁻), with its own f and its own weights w."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """The logits of one expert and of what it is compared with, both (rows, vocabulary)."""

    expert: Tensor
    anti: Tensor


class Rule(ABC):
    """A way to combine the base's logits z with those of experts z⁺ and anti-experts z⁻."""

    @abstractmethod
    def filtered(self, z: Tensor) -> Tensor:
        """f(z): the base's logits, −∞ where a token is not to be chosen whatever the experts say."""

    @abstractmethod
    def weights(self, z: Tensor, pairs: Sequence[Pair], alphas: Sequence[float]) -> Tensor:
        """w (experts, rows), from the strengths α that the user gave."""

    def combine(self, z: Tensor, pairs: Sequence[Pair], alphas: Sequence[float]) -> tuple[Tensor, Tensor]:
        """(log P̃ (rows, vocabulary), w), all in float32 or wider: normalised, so that beams can be compared."""
        w = self.weights(z, pairs, alphas)
        return (self.filtered(z) + shift(pairs, w)).log_softmax(-1), w


def shift(pairs: Sequence[Pair], w: Tensor) -> Tensor:
    """Σ_t w_t (z_t⁺ − z_t⁻) for weights (experts, …, rows), giving (…, rows, vocabulary)."""
    terms = [w_t[..., None] * (pair.expert - pair.anti) for w_t, pair in zip(w, pairs, strict=True)]
    return torch.stack(terms).sum(0)


def as_given(z: Tensor, alphas: Sequence[float]) -> Tensor:
    """The user's strengths in every row, (experts, rows)."""
    return torch.tensor(alphas, dtype=z.dtype, device=z.device)[:, None].expand(-1, z.shape[0])
