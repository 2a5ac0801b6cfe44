"""Whole documents as rows of tokens for a language model: every token is to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def cut(tokenizer: Any, texts: Sequence[str], length: int) -> list[list[int]]:
    """Token ids of each text, ended by the end-of-text token and cut into rows of `length`; the last may be shorter."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [(ids + end)[i : i + length] for ids in encoded for i in range(0, len(ids), length)]
    return [row for row in rows if len(row) > 1]  # a lone token has none before it
