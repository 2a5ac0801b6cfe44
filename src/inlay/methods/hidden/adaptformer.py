from __future__ import annotations

from typing import ClassVar

from inlay.core.method import option, register
from inlay.methods.hidden.bottleneck import Parallel


@register
class AdaptFormer(Parallel):
    """y ← y + s (W_up ReLU(W_down x + b_down) + b_up), x the normalised input and y the output of the MLP, s = 0.1.

    The parallel adapter as it is used in vision transformers: a small fixed s, and every block. Official code feeds the
    bottleneck with the residual stream before its LayerNorm, the paper's equation with LN(x), which is followed here.
    """

    paper: ClassVar[str] = "Chen et al. 2022, arXiv 2205.13535"
    where: ClassVar[tuple[str, ...]] = ("mlp",)
    learning_rate: ClassVar[float] = 1e-3

    scale: float = option(default=0.1, doc="factor s on what the adapter adds")
