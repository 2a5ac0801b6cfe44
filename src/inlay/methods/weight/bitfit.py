from __future__ import annotations

from typing import ClassVar

from torch import nn

from inlay.core.method import ParameterMethod, option, register


@register
class BitFit(ParameterMethod):
    """y = W x + b′: bias vectors alone are trained.

    All biases of the base by default, LayerNorm's β included; `where` narrows the modules, e.g. `["attn.q", "mlp.up"]`
    for the paper's reduced variant.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Ben Zaken, Goldberg & Ravfogel 2021, arXiv 2106.10199"
    learning_rate: ClassVar[float] = 6e-3

    norms: bool = option(default=True, doc="train the biases of normalisation layers as well")

    def wants(self, module: nn.Module, name: str) -> bool:
        p = module._parameters.get(name)
        is_bias = name.endswith("bias") and p is not None and p.dim() == 1
        return is_bias and (self.norms or not is_norm(module))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer of torch or of transformers (LayerNorm, RMSNorm, BatchNorm, …)."""
    return "norm" in type(module).__name__.lower()
