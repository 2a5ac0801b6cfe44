"""Experts, and whether their vocabulary is the base's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from inlay.core.errors import FusionError
from inlay.fusion.voice import Acting

SHOWN = 3


@dataclass(frozen=True, eq=False)
class Expert:
    """What a small model learnt: the difference between an expert and an anti-expert, and how far to follow it.

    Args:
        expert: the tuned model, or `Acting(model, "adapter")`; None lets the base's own logits stand in.
        anti: the same model untuned, `Acting(model)` with the adapter off, or one tuned on what is not wanted; or None.
        alpha: strength α; 0 leaves the expert out, a negative one turns it round.
        tokenizer: of expert and anti-expert, to be compared with the base's.
    """

    expert: nn.Module | Acting | None
    anti: nn.Module | Acting | None = None
    alpha: float = 1.0
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if self.expert is None and self.anti is None:
            raise FusionError("an Expert needs a model to follow, one to turn away from, or both")


def vocabulary(model: nn.Module) -> int:
    """How many logits a decoder gives; FusionError where it gives none to each token."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise FusionError(f"{type(model).__name__} is an encoder-decoder: fusion is for decoders that stand alone")
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise FusionError(f"{type(model).__name__} has no output layer over a vocabulary: open it as a causal-lm")
    return int(head.weight.shape[0])


def check_vocabulary(base: nn.Module, tokenizer: Any, expert: Expert) -> None:
    """FusionError where token ids of an expert are not those of the base.

    What an expert has beyond the base's vocabulary is never looked at. Where it has less, its tokenizer must show that
    the base's other rows stand for no token.
    """
    size = vocabulary(base)
    for voice in (expert.expert, expert.anti):
        if voice is None:
            continue
        model = voice.model if isinstance(voice, Acting) else voice
        own = vocabulary(model)
        known = tokenizer is not None and expert.tokenizer is not None
        if own < size and not known:
            raise FusionError(
                f"the base chooses among {size:,} tokens and {type(model).__name__} among {own:,}: their vocabularies "
                "differ. Where the base's table is only padded, show it: fuse(…, tokenizer=…), Expert(…, tokenizer=…)"
            )
        if own < size and len(tokenizer) > own:
            raise FusionError(
                f"the base's tokenizer has {len(tokenizer):,} tokens, for which {type(model).__name__} gives only "
                f"{own:,} logits"
            )
    if tokenizer is not None and expert.tokenizer is not None:
        check_tokens(tokenizer, expert.tokenizer, size)


def check_tokens(tokenizer: Any, other: Any, size: int) -> None:
    """FusionError naming the tokens that two tokenizers number differently, of the base's first `size`."""
    here, there = tokenizer.get_vocab(), other.get_vocab()
    here = {token: n for token, n in here.items() if n < size}
    differing = sorted((token for token, n in here.items() if there.get(token) != n), key=here.__getitem__)
    if differing:
        shown = ", ".join(f"{t!r} is {here[t]} and {there.get(t, 'none')}" for t in differing[:SHOWN])
        raise FusionError(
            f"base and expert number {len(differing):,} of {len(here):,} tokens differently ({shown}): experts must be "
            "of the base's own vocabulary"
        )
