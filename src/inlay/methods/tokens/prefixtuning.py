from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from inlay.core.attention import recorded
from inlay.core.errors import OptionError, SiteError
from inlay.core.method import option, register
from inlay.core.modes import evaluating
from inlay.core.sites import Site
from inlay.core.towers import Spot
from inlay.methods.tokens.deepprompt import DeepPrompt
from inlay.methods.tokens.words import check_words, ids_of, word_ids


@register
class PrefixTuning(DeepPrompt):
    """K′ = [P_k; K], V′ = [P_v; V] in every attention, with p trained keys and values per key-value head.

    P_k and P_v (L, heads, p, head size) for the L attentions of a tower. With `reparameterize` they come out of one MLP
    over E (p, d) while training, P = W₂ tanh(W₁ E + b₁) + b₂, and the MLP is folded away when the adapter is saved. The
    cache never holds the prefix and the positions of tokens do not move (`shift` counts it, as PEFT does).
    """

    paper: ClassVar[str] = "Li & Liang 2021, arXiv 2101.00190"
    where: ClassVar[tuple[str, ...]] = ("attn",)
    learning_rate: ClassVar[float] = 3e-2

    init: Literal["normal", "zero", "vocabulary", "text"] = option(
        default="normal", doc="start at noise, at zero, or at the keys and values of random words or of a text"
    )
    text: str = option(default="", doc="the text that text_ids were made from, for the record")
    text_ids: list[int] = option(default=[], doc="token ids of the text, repeated or cut to p")

    def validate(self) -> None:
        check_words(type(self).__name__, self.init, self.text, self.text_ids)
        if self.reparameterize and self.init in ("vocabulary", "text"):
            raise OptionError(
                "PrefixTuning: words give keys and values, not an MLP: reparameterize=False, or init='normal'"
            )

    def with_text(self, text: str, tokenizer: Any) -> Self:
        """The same method, started at the keys and values of a text's tokens (a transformers tokenizer makes them)."""
        return self.replace(init="text", text=text, text_ids=ids_of(text, tokenizer))

    def start(self, site: Site, spots: list[Spot]) -> tuple[Tensor, Tensor]:
        return self.read(site, spots) if self.init in ("vocabulary", "text") else self.drawn(spots)

    @torch.no_grad()
    def read(self, site: Site, spots: list[Spot]) -> tuple[Tensor, Tensor]:
        """The keys and values of words, as the base makes them."""
        tower = site.tower
        assert tower is not None
        assert site.inlay is not None
        if tower.embedding is None or any(spot.is_cross for spot in spots):
            raise SiteError(f"{self.label()}: only self-attention over token ids can begin with words")
        ids = word_ids(self.init, self.text_ids, self.tokens, tower.embedding.num_embeddings)
        with evaluating(tower.module), site.inlay.only(), recorded(spots) as recorders:
            tower.module(input_ids=torch.tensor([ids], device=tower.embedding.weight.device))
        found = [recorder.found for recorder in recorders if recorder.found is not None]
        keys, values = zip(*found, strict=True)
        return torch.stack(keys), torch.stack(values)
