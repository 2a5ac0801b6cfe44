from __future__ import annotations

from typing import ClassVar

from inlay.core.method import option, register
from inlay.methods.hidden.bottleneck import Activation, Series


@register
class Houlsby(Series):
    """y ← y + W_up σ(W_down y + b_down) + b_up, after attention and after the feed-forward of every block.

    It stands where the sub-layer's output projection ends, before the residual sum and its normalisation. The paper
    starts near the base (`init="near"`) and trains the blocks' LayerNorms as well: `[Houlsby(), NormTuning()]`. At one
    of the two places, `Houlsby().on("mlp.down")`, it is the series adapter.
    """

    paper: ClassVar[str] = "Houlsby et al. 2019, arXiv 1902.00751"
    where: ClassVar[tuple[str, ...]] = ("attn.o", "mlp.down")

    activation: Activation = option(default="gelu", doc="non-linearity σ")
