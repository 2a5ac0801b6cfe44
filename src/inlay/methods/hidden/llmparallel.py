from __future__ import annotations

from typing import ClassVar

from inlay.core.method import option, register
from inlay.methods.hidden.bottleneck import Activation, Parallel


@register
class LLMParallel(Parallel):
    """y ← y + W_up tanh(W_down x), beside the linear layers of the feed-forward: LLM-Adapters' parallel adapter.

    x and y are the input and the output of one linear layer, not of the whole feed-forward, and there are no biases.
    Official code starts both matrices at N(0, 0.02²), which is `init="bert"`.
    """

    paper: ClassVar[str] = "Hu et al. 2023, arXiv 2304.01933"
    where: ClassVar[tuple[str, ...]] = ("mlp.up", "mlp.down")
    learning_rate: ClassVar[float] = 5e-4

    r: int = option(default=256, doc="bottleneck width", low=1)
    activation: Activation = option(default="tanh", doc="non-linearity σ")
    bias: bool = option(default=False, doc="train b_down and b_up; otherwise there are none")
