from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from inlay.core.method import ParameterMethod, option, register
from inlay.core.quantised import is_quantised


@register
class GaLore(ParameterMethod):
    """W_{t+1} = W_t − η·s·N_t P,  N_t AdamW's step from R_t = G_t Pᵀ,  P the r leading singular vectors of a G_t.

    Every number of the matrices in the blocks is trained, and the optimizer keeps its moments in a subspace of rank r:
    2 r·max(m, n) + r·min(m, n) numbers for W (m, n) instead of 2mn. P holds right singular vectors where m ≥ n (left
    ones otherwise) and is found anew every so many steps, one matrix at a time. A matrix with r ≥ min(m, n) is
    optimised by plain AdamW at s times the rate. Kernels are flattened, experts projected one by one. Vectors are left
    to other methods, `[GaLore(), BitFit()]`, and so are embeddings and heads unless `where` names them.

    The projection is the optimizer's: use `inlay.optimizer(adapter)`, as `inlay train` does. As with `Full`, the
    matrices are trained copies beside a base that stays as it was, so the weights are held twice; what GaLore saves is
    the optimizer's state (of the blocks of MiniLM: 2.2 MB at r = 8 where AdamW keeps 84.9 MB), and with `per_layer`
    all gradients but one. Decay comes before the step, where the official code has it after.
    """

    kind: ClassVar[str] = "gradient"
    paper: ClassVar[str] = "Zhao et al. 2024, arXiv 2403.03507"
    where: ClassVar[tuple[str, ...]] = ("block",)
    learning_rate: ClassVar[float] = 1e-2

    r: int = option(default=8, doc="rank of the projected gradients", low=1)
    every: int = option(default=200, doc="steps between two projections", low=1)
    scale: float = option(default=0.25, doc="factor s on the projected step", low=1e-6)
    per_layer: bool = option(
        default=False, doc="step each matrix within the backward pass; no accumulation, no clipping (`clip: null`)"
    )

    def wants(self, module: nn.Module, name: str) -> bool:
        p = module._parameters.get(name)
        return is_quantised(module) or (p is not None and p.dim() > 1)

    def optimised(self, name: str) -> dict[str, Any]:
        p = self.get_parameter(name)
        stacked = p.dim() == 3 and not isinstance(self.site.module, nn.Conv1d)
        m, n = p.shape[-2:] if stacked else (p.shape[0], p.shape[1:].numel())
        rank = self.r if self.r < min(m, n) else None
        return {"rank": rank, "every": self.every, "scale": self.scale, "stacked": stacked, "per_layer": self.per_layer}
