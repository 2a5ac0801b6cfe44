from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from inlay.core.method import PromptMethod, option, register, uniform
from inlay.core.sites import Site
from inlay.methods.tokens.words import check_words, ids_of, word_ids


@register
class PromptTuning(PromptMethod):
    """X′ = [P; X] with p trained vectors P before the input embeddings.

    P (p, d) has positions, attention and a place in the cache like any token; masks, token types and positions follow,
    and the virtual tokens are cut off before pooling and heads, so labels and logits keep the user's length. In an
    encoder-decoder P goes into the encoder and stays there for the decoder to attend to (`where="decoder.embed"` is
    the other place). It starts from words rather than from noise: that learns sooner at small scale.
    """

    paper: ClassVar[str] = "Lester, Al-Rfou & Constant 2021, arXiv 2104.08691"
    learning_rate: ClassVar[float] = 2e-1

    init: Literal["vocabulary", "text", "random"] = option(
        default="vocabulary", doc="start at embeddings of random words, at those of a text, or uniformly at random"
    )
    scale: float = option(default=0.5, doc="bound of the uniform start", low=0.0)
    text: str = option(default="", doc="the text that text_ids were made from, for the record")
    text_ids: list[int] = option(default=[], doc="token ids of the text, repeated or cut to p")

    def validate(self) -> None:
        check_words(type(self).__name__, self.init, self.text, self.text_ids)

    def with_text(self, text: str, tokenizer: Any) -> Self:
        """The same method, started at the embeddings of a text's tokens (a transformers tokenizer makes them)."""
        return self.replace(init="text", text=text, text_ids=ids_of(text, tokenizer))

    def build(self, site: Site) -> None:
        tower = site.tower
        assert tower is not None
        assert tower.embedding is not None
        assert site.inlay is not None
        if self.init == "random":
            P = uniform((self.tokens, site.features), self.scale)
        else:
            ids = word_ids(self.init, self.text_ids, self.tokens, tower.embedding.num_embeddings)
            with site.inlay.only():  # the base's own embeddings
                P = tower.embedded(ids)
        self.P = nn.Parameter(P.to(site.dtype, copy=True))

    def count(self, site: Site) -> int:
        return self.tokens * site.features

    def prompt(self) -> Tensor:
        return self.P
