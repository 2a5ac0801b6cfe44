"""Which tokens a method edits: the first and the last of the prompt, on unpadded lengths, whatever the padding side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core.errors import AdapterError, OptionError, SiteError

if TYPE_CHECKING:
    from inlay.core.container import Call

IGNORED = -100
"""The label that carries no loss, in transformers and in torch."""


@dataclass(frozen=True)
class Positions:
    """`f7+l7`: the first 7 and the last 7 tokens of a prompt; `f1`, `l3`; `all`.

    A prompt of n tokens gives its first min(f, ⌊n/2⌋) and its last min(l, ⌊n/2⌋), so that the two never overlap.
    """

    first: int = 0
    last: int = 0
    everything: bool = False

    @classmethod
    def read(cls, text: str) -> Positions:
        """From text; OptionError says what is understood."""
        if text == "all":
            return cls(everything=True)
        found = re.fullmatch(r"(?=[fl])(?:f(\d+))?(?:(?:^|\+)l(\d+))?", text)
        first, last = (int(n or 0) for n in found.groups()) if found else (0, 0)
        if first + last == 0:
            raise OptionError(f"positions '{text}' are not understood: write 'f7+l7', 'f1', 'l3' or 'all'")
        return cls(first, last)

    def of(self, call: Call, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(where, valid), both (batch, first + last): indices along the padded sequence, and which of them count.

        A prompt that is too short has fewer positions; those in excess point at some token and are not valid.
        """
        seen, n = tokens(call, batch, length, device)
        half = n // 2
        rank = torch.arange(self.first + self.last, device=device).expand(batch, -1)
        back = self.first + self.last - rank  # of the last ones: 1 is the very last
        front = rank < self.first
        valid = torch.where(front, rank < half, back <= half)
        nth = torch.where(front, rank + 1, n - back + 1)  # counted from 1 among the real tokens
        return torch.searchsorted(seen, nth).clamp(0, length - 1), valid


def tokens(call: Call, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(real tokens up to each place (batch, length), tokens of each prompt (batch, 1))."""
    if call.mask is None:
        seen = torch.arange(1, length + 1, device=device).expand(batch, -1).contiguous()
    else:
        if call.mask.shape != (batch, length):
            raise SiteError(
                f"the attention mask is {tuple(call.mask.shape)} where the tokens are ({batch}, {length}): "
                "the prompt cannot be found; use positions='all'"
            )
        seen = call.mask.to(device, torch.int64).cumsum(1)
    whole = seen[:, -1:]
    return seen, whole if call.prompt is None else torch.minimum(call.prompt.to(device)[:, None], whole)


def real_tokens(mask: Any) -> Tensor | None:
    """A model's attention mask as (batch, tokens), true = real; None where it has none.

    Static caches are given four-dimensional masks (batch, 1, queries, keys), boolean or additive, or one per kind of
    layer: the last query sees every real token, and there are more keys than queries while the cache has room.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask != 0
    seen = mask[:, 0, -1, : mask.shape[2]]
    return seen if seen.dtype is torch.bool else seen == 0


def marked_prompts(ids: Any, labels: Any, mask: Tensor | None) -> Tensor | None:
    """Tokens before the first one that carries loss, (batch,): a prompt with the answer to be learnt behind it.

    Only labels that repeat the ids mark an answer (those of masked-language or tagging models do not), and a row whose
    loss begins at its first token has no prompt apart: its whole sequence is one.
    """
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor) or labels.shape != ids.shape or ids.dim() != 2:
        return None
    if mask is not None and mask.shape != ids.shape:
        return None
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    answer = (labels != IGNORED) & real
    seen = real.cumsum(1)
    whole = seen[:, -1]
    before = torch.where(answer, seen - 1, whole[:, None]).amin(1)
    repeats = (~answer | (labels == ids)).all(1)
    return torch.where(repeats & (before > 0), before, whole)


def spread(given: Tensor, batch: int, what: str = "prompt lengths") -> Tensor:
    """What was given of each row, for each row of the batch: those of a multiple batch are consecutive (beams)."""
    if batch % len(given) != 0:
        raise AdapterError(f"{len(given)} {what} were given for a batch of {batch}")
    return given.repeat_interleave(batch // len(given), dim=0)


@contextmanager
def prompts(model: nn.Module, lengths: Tensor | Sequence[int] | int) -> Iterator[None]:
    """Say how many real tokens of each row are its prompt, for methods that edit prompts only.

    Not needed where a prompt is read into an empty cache (`generate`), nor where `labels` are passed that mark the
    answer: it is for scoring prompts with answers behind them, and for generating without a cache.
    """
    from inlay.core.active import attached

    state = attached(model).state
    before = state.prompt
    state.prompt = torch.as_tensor(lengths).reshape(-1)
    if (state.prompt < 1).any():
        raise AdapterError(f"a prompt has at least one token, got lengths {state.prompt.tolist()}")
    try:
        yield
    finally:
        state.prompt = before


@contextmanager
def directions(model: nn.Module, chosen: Sequence[int] | Sequence[Sequence[int]]) -> Iterator[None]:
    """Let only these of the r directions of LoReFT and its kin act, for all rows or for each its own.

    An intervention's directions are subspaces that can be learnt apart and composed: train one task's rows inside
    `directions(model, [0, 1, 2, 3])`, another's inside `directions(model, [4, 5, 6, 7])`, or both in one batch with a
    list for each row, and use both together with all eight, which is what acts outside of this context.
    """
    from inlay.core.active import attached

    state = attached(model).state
    before = state.directions
    common = [n for n in chosen if isinstance(n, int)]
    rows = [common] if common else [list(row) for row in chosen if not isinstance(row, int)]
    most = 1 + max((n for row in rows for n in row), default=0)
    if not rows or any(n < 0 for row in rows for n in row):
        raise AdapterError(f"directions are numbers from 0, for all rows or a list for each, got {chosen!r}")
    state.directions = torch.tensor([[n in row for n in range(most)] for row in rows])
    try:
        yield
    finally:
        state.directions = before
