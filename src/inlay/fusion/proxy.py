"""Proxy-tuning: what tuning did to a small model, added to a large one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from inlay.fusion.rule import Pair, Rule, as_given


class ProxyTuning(Rule):
    """s = z + Σ_t α_t (z_t⁺ − z_t⁻): z⁺ of a small tuned model, z⁻ of the same one untuned.

    Liu et al. 2024, arXiv 2401.08565, where there is one expert and α = 1.
    """

    def filtered(self, z: Tensor) -> Tensor:
        return z

    def weights(self, z: Tensor, pairs: Sequence[Pair], alphas: Sequence[float]) -> Tensor:
        return as_given(z, alphas)
