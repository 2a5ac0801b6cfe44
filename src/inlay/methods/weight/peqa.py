from __future__ import annotations

from typing import ClassVar

from torch import nn

from inlay.core.affine import AffineLinear
from inlay.core.method import ParameterMethod, register


@register
class PEQA(ParameterMethod):
    """W′ = (s₀ + Δs) ⊙ (W̄ − z),  W̄ = clamp(⌊W/s₀⌉ + z, 0, 2ᵇ − 1).

    On a base held on an affine grid, the scales s alone are trained: one for every row of W, or for every group of its
    inputs where the grid has groups. The integers W̄ and the zero points z stay as they are, so switching tasks swaps
    scales, and a merged base is as many bits as before. s₀ is each row's clipped grid of least squared error.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Kim et al. 2023, arXiv 2305.14152"
    needs: ClassVar[str] = "int4"
    learning_rate: ClassVar[float] = 3e-4

    def wants(self, module: nn.Module, name: str) -> bool:
        return name == "scale" and isinstance(module, AffineLinear)
