from __future__ import annotations

from typing import ClassVar

from inlay.core.method import option, register
from inlay.methods.hidden.bottleneck import Activation, Series


@register
class LLMSeries(Series):
    """y ← y + W_up tanh(W_down y), after the feed-forward's last projection: LLM-Adapters' series adapter.

    Without biases. Official code starts both matrices at N(0, 0.02²), which is `init="bert"`.
    """

    paper: ClassVar[str] = "Hu et al. 2023, arXiv 2304.01933"
    where: ClassVar[tuple[str, ...]] = ("mlp.down",)
    learning_rate: ClassVar[float] = 1e-3

    r: int = option(default=256, doc="bottleneck width", low=1)
    activation: Activation = option(default="tanh", doc="non-linearity σ")
    bias: bool = option(default=False, doc="train b_down and b_up; otherwise there are none")
