from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from inlay.core.method import ParameterMethod, option, register
from inlay.core.sites import Site
from inlay.methods.weight.bitfit import is_norm


@register
class NormTuning(ParameterMethod):
    """y = γ′ ⊙ (x − μ)/σ + β′: the affine parameters of normalisation layers alone are trained.

    LayerNorm, RMSNorm, BatchNorm and GroupNorm. BatchNorm's μ and σ are explicit. With "frozen", as beside every
    other method, they are the base's running statistics, in training as in evaluation, and never change. With
    "adapted" the adapter has running statistics of its own, which start at the base's: in training a batch is
    normalised with its own μ and σ and the copies follow them, in evaluation the copies normalise. They are saved and
    merged with the adapter, and switched off with it.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Frankle, Schwab & Morcos 2020, arXiv 2003.00152; Zhao et al. 2023, arXiv 2312.11420"
    learning_rate: ClassVar[float] = 6e-3

    statistics: Literal["frozen", "adapted"] = option(
        default="frozen", doc="BatchNorm's running statistics: the base's, or copies that follow the training data"
    )

    def wants(self, module: nn.Module, name: str) -> bool:
        return is_norm(module)

    def follows(self, site: Site) -> tuple[str, ...]:
        running = isinstance(site.module, _NormBase) and site.module._buffers["running_mean"] is not None
        here = self.statistics == "adapted" and site.param == "weight" and running  # once per layer, with its γ
        return ("running_mean", "running_var", "num_batches_tracked") if here else ()
