"""Where a run's batches come from: the whole model, or a part of it on what frozen layers gave once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.core.adapter import Adapter
from inlay.core.head import Head
from inlay.evaluate.predict import Source, whole
from inlay.recipe import Recipe
from inlay.train.frozen import CHUNK, Frozen, Say
from inlay.train.headonly import HeadOnly
from inlay.train.prefix import Prefix, below
from inlay.train.store import Pointless, Room, Unfit
from inlay.work import Work

PASSES = 2.0
"""Passes over the training rows from which on `cache: auto` keeps states."""
SHARE = 0.2
"""Share of the blocks that must lie below for it: what fewer cost is little beside the steps themselves."""


@dataclass(frozen=True)
class Chosen:
    """A source, and what there is to tell about the choice."""

    source: Source
    about: dict[str, Any]
    """`kept` (what, in words), `place`, `bytes`, `dtype`; or `why_not`."""


def source_for(work: Work, adapter: Adapter, recipe: Recipe, passes: float, say: Say) -> Chosen:
    """The cheapest source that gives what the whole model gives.

    Args:
        passes: over the training rows that the run makes.
        say: told what is kept, and why nothing is where that was asked for or would have paid.
    """
    if not recipe.cache:
        return Chosen(whole(work), {"why_not": "cache is off"})
    reasons: list[Unfit] = []
    for make in candidates(work, adapter, recipe, passes, say):
        try:
            source = make()
            source.check(adapter, recipe.base_dropout)
            source.reserve()
            say(f"{source.name} is computed once and kept {source.where} ({source.bytes / 1e6:.4g} MB)")
            return Chosen(source, source.about())
        except Unfit as reason:
            reasons.append(reason)
    why = next((reason for reason in reasons if not isinstance(reason, Pointless)), reasons[-1])
    if recipe.cache != "auto" or not isinstance(why, Pointless):
        say(f"what is frozen is computed in every pass: {why}")
    return Chosen(whole(work), {"why_not": str(why)})


def candidates(work: Work, adapter: Adapter, recipe: Recipe, passes: float, say: Say) -> Iterator[Callable[[], Frozen]]:
    """What makes sources that compute only a part of the model, the smallest part first; they raise Unfit."""
    room, chunk = Room.of(recipe, Path(recipe.output)), min(CHUNK, recipe.evaluate_batch)
    alone = all(isinstance(level.method, Head) for level in adapter.levels)
    if alone and len(adapter.head) == 1 and work.task != "causal-lm":
        yield lambda: HeadOnly(work, adapter.head[0], room, chunk, say)

    def prefix() -> Prefix:
        auto = recipe.cache == "auto"
        if auto and passes < PASSES:
            raise Pointless("the training rows are gone through less than twice")
        blocks, total = below(work)
        if auto and len(blocks) < SHARE * total:
            raise Pointless(f"only {len(blocks)} of {total} blocks lie below the lowest adapted place")
        return Prefix(work, blocks, total, room, chunk, say)

    yield prefix
