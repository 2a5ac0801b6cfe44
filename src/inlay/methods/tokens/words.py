"""Token ids to begin virtual tokens with."""

from __future__ import annotations

import random
from typing import Any

import torch

from inlay.core.errors import OptionError


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
