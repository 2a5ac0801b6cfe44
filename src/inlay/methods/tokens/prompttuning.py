from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from inlay.core.method import register
from inlay.core.sites import Site
from inlay.methods.tokens.words import WordedPrompt


@register
class PromptTuning(WordedPrompt):
    """X′ = [P; X] with p trained vectors P before the input embeddings.

    P (p, d) has positions, attention and a place in the cache like any token; masks, token types and positions follow,
    and the virtual tokens are cut off before pooling and heads, so labels and logits keep the user's length. In an
    encoder-decoder P goes into the encoder and stays there for the decoder to attend to (`where="decoder.embed"` is
    the other place). It starts from words rather than from noise: that learns sooner at small scale.
    """

    paper: ClassVar[str] = "Lester, Al-Rfou & Constant 2021, arXiv 2104.08691"
    learning_rate: ClassVar[float] = 2e-1

    def build(self, site: Site) -> None:
        self.P = nn.Parameter(self.start(site))

    def count(self, site: Site) -> int:
        return self.tokens * site.features

    def prompt(self) -> Tensor:
        return self.P
