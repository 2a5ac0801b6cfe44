"""What the levels at one module need of it, counted, so that one more or one less is seen without asking the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from inlay.core.method import HiddenMethod, ParameterMethod

if TYPE_CHECKING:
    from inlay.core.levels import Level


class Needs:
    """How many levels need a thing; what none needs has no entry."""

    def __init__(self) -> None:
        self.tensors: Counter[str] = Counter()
        """Tensors of the module that levels adapt, by name."""
        self.states: Counter[str] = Counter()
        """Buffers of the module that levels have copies of, by name."""
        self.entries: Counter[str] = Counter()
        """Paths of modules whose inputs levels ask for."""
        self.heard: Counter[str] = Counter()
        """Paths of modules whose outputs levels ask for."""

    def count(self, level: Level, by: int) -> None:
        """A level comes (1) or goes (−1)."""
        for kind, name in needed(self, level):
            kind[name] += by
            if not kind[name]:
                del kind[name]


def needed(needs: Needs, level: Level) -> Iterator[tuple[Counter[str], str]]:
    """What one level needs, each with the kind it is counted as."""
    site, method = level.site, level.method
    if not isinstance(method, HiddenMethod):
        yield needs.tensors, site.param
    if method.acts_on_bias:
        yield needs.tensors, site.bias_name
    if isinstance(method, ParameterMethod):
        yield from ((needs.states, name) for name in method.states())
    yield from ((needs.entries, path) for path in site.entrances)
    yield from ((needs.heard, source.path) for source in site.hears.values())
