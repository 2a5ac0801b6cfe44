from __future__ import annotations

from typing import ClassVar

from torch import nn

from inlay.core.method import ParameterMethod, register
from inlay.methods.weight.bitfit import is_norm


@register
class NormTuning(ParameterMethod):
    """y = γ′ ⊙ (x − μ)/σ + β′: the affine parameters of normalisation layers alone are trained.

    LayerNorm, RMSNorm, BatchNorm and GroupNorm. BatchNorm's running statistics belong to the base: they are frozen
    with it, and used in training as in evaluation while an adapter is attached (see `inlay.core.adapter`).
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Frankle, Schwab & Morcos 2020, arXiv 2003.00152; Zhao et al. 2023, arXiv 2312.11420"
    learning_rate: ClassVar[float] = 6e-3

    def wants(self, module: nn.Module, name: str) -> bool:
        return is_norm(module)
