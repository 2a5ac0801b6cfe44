from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from inlay.core.method import option, register
from inlay.methods.hidden.bottleneck import Dense
from inlay.methods.weight.bitfit import is_norm


@register
class Pfeiffer(Dense):
    """y ← y + W_up σ(W_down y + b_down) + b_up, after the feed-forward of every block.

    At a block's last normalisation (`.on("norm2")` in BERT and RoBERTa, where it follows the residual sum z) it reads
    the normalised sum and writes before it, z ← z + f(LN(z)), which is the arrangement of the AdapterHub library; in
    models that normalise first that arrangement is `.on("block")`.
    """

    paper: ClassVar[str] = "Pfeiffer et al. 2020, arXiv 2005.00247"
    where: ClassVar[tuple[str, ...]] = ("mlp.down",)

    r: int = option(default=48, doc="bottleneck width", low=1)

    def before(self, x: Tensor) -> Tensor:
        if not is_norm(self.site.module) or not self.keeps():
            return x
        return x + self.f(self.site.module.forward(x))  # not a call: the levels at this module act once

    def adapted(self, x: Tensor, y: Tensor) -> Tensor:
        return y if is_norm(self.site.module) else y + self.f(y)
