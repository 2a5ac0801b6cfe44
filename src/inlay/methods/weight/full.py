from __future__ import annotations

from typing import ClassVar

from torch import nn

from inlay.core.method import ParameterMethod, register


@register
class Full(ParameterMethod):
    """θ′ = θ_trained: full fine-tuning of every tensor of the base.

    The yardstick. Each tensor is a trained copy, so the base stays bit-identical, the result can be switched off or
    stacked like any adapter, and memory holds the base once more. Tied tensors stay tied.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "full fine-tuning"
    learning_rate: ClassVar[float] = 3e-4

    def wants(self, module: nn.Module, name: str) -> bool:
        return True
