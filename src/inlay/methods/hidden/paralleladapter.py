from __future__ import annotations

from typing import ClassVar

from inlay.core.method import option, register
from inlay.methods.hidden.bottleneck import Parallel


@register
class ParallelAdapter(Parallel):
    """y ← y + s (W_up σ(W_down x + b_down) + b_up), x the input and y the output of a sub-layer.

    Beside the feed-forward by default, beside attention with `.on("attn")`. The paper's best has r = 512 and s = 4;
    together with `PrefixTuning(tokens=30)` it is the MAM adapter.
    """

    paper: ClassVar[str] = "He et al. 2021, arXiv 2110.04366"
    where: ClassVar[tuple[str, ...]] = ("mlp",)
    learning_rate: ClassVar[float] = 5e-4

    scale: float = option(default=4.0, doc="factor s on what the adapter adds")
