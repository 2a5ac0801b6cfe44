"""DExperts: an expert and an anti-expert choose among the tokens that the base finds likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.core.errors import OptionError
from inlay.fusion.rule import Pair, Rule, as_given


@dataclass(frozen=True)
class DExperts(Rule):
    """P̃ ∝ softmax(top_p(z) + Σ_t α_t (z_t⁺ − z_t⁻)): the base is filtered *before* the experts are heard.

    Liu et al. 2021, arXiv 2105.03023. Either of the two may be absent (None); the base's logits stand in for it.

    Args:
        top_p: keep the fewest tokens whose probabilities sum to this, by the base; 1 keeps all. The paper's is 0.9.
        top_k: keep this many tokens; 0 keeps all.
    """

    top_p: float = 0.9
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise OptionError(f"DExperts: top_p is a share of the probability, above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise OptionError(f"DExperts: top_k is a number of tokens, or 0 for all, got {self.top_k}")

    def filtered(self, z: Tensor) -> Tensor:
        if self.top_k and self.top_k < z.shape[-1]:
            z = z.masked_fill(z < z.topk(self.top_k).values[..., -1:], -torch.inf)
        if self.top_p < 1:
            p, order = z.softmax(-1).sort(descending=True)
            before = p.cumsum(-1) - p  # the first token has none before it and always stays
            z = z.masked_fill(torch.zeros_like(p).scatter(-1, order, before) >= self.top_p, -torch.inf)
        return z

    def weights(self, z: Tensor, pairs: Sequence[Pair], alphas: Sequence[float]) -> Tensor:
        return as_given(z, alphas)
