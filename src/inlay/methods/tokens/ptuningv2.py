from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.core.towers import Spot
from inlay.methods.tokens.deepprompt import DeepPrompt


@register
class PTuningV2(DeepPrompt):
    """K′ = [dropout(P_k); K], V′ = [dropout(P_v); V] in every attention, and an ordinary task head on the tokens.

    Deep prompts for understanding. Prefix tuning's equation, P_k and P_v (L, heads, p, head size), with another recipe:
    encoders as well as decoders, a linear head in place of words for the classes, the table trained directly from
    N(0, `scale`²) rather than through an MLP (`reparameterize` brings prefix tuning's), dropout on the prefix, and a
    length that depends on the task: about 20 for plain classification, 100 and more for harder ones such as RTE. The
    paper trains for up to 100 epochs. Official code counts the prefix in the positions of the tokens: `shift` does so.
    """

    paper: ClassVar[str] = "Liu et al. 2021, arXiv 2110.07602"
    where: ClassVar[tuple[str, ...]] = ("attn",)
    learning_rate: ClassVar[float] = 3e-2

    init: Literal["normal", "zero"] = option(default="normal", doc="start at noise or at zero")
    scale: float = option(default=1.0, doc="deviation of the normal start", low=0.0)
    dropout: float = option(default=0.1, doc="dropout on P", low=0.0, high=0.99)

    def start(self, site: Site, spots: list[Spot]) -> tuple[Tensor, Tensor]:
        return self.drawn(spots)
