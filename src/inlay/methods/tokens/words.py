"""Token ids to begin virtual tokens with."""

from __future__ import annotations

import random
from typing import Any, Literal, Self

import torch
from torch import Tensor

from inlay.core.errors import OptionError
from inlay.core.method import PromptMethod, option, uniform
from inlay.core.sites import Site


class WordedPrompt(PromptMethod):
    """A prompt P (p, d) of free vectors, which begins at the embeddings of words or at noise."""

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

    def start(self, site: Site) -> Tensor:
        """P to begin with."""
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
        return P.to(site.dtype, copy=True)


def word_ids(init: str, text_ids: list[int], tokens: int, vocabulary: int) -> list[int]:
    """`tokens` ids: those of a text, repeated or cut, or drawn from the whole vocabulary with torch's seed."""
    if init == "vocabulary":  # not by torch, whose numbers cannot be read while a plan runs on shapes alone
        return random.Random(torch.initial_seed()).choices(range(vocabulary), k=tokens)
    if not 0 <= min(text_ids) <= max(text_ids) < vocabulary:
        raise OptionError(f"text_ids run from {min(text_ids)} to {max(text_ids)}, the vocabulary has {vocabulary}")
    return (text_ids * -(-tokens // len(text_ids)))[:tokens]


def check_words(owner: str, init: str, text: str, text_ids: list[int]) -> None:
    """OptionError where a text has no ids, or ids have no use."""
    if init == "text" and not text_ids:
        raise OptionError(
            f"{owner}: init='text' needs token ids: {owner}(…).with_text(text, tokenizer), or text_ids=[…]"
        )
    if init != "text" and (text or text_ids):
        raise OptionError(f"{owner}: text and text_ids are for init='text', not for init='{init}'")


def ids_of(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text's own words, without special tokens, from a tokenizer of transformers."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise OptionError(f"the text {text!r} has no tokens")
    return list(ids)
