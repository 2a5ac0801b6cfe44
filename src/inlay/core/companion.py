"""Methods that stand beside others and govern how those are trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from inlay.core.method import Method
from inlay.core.sites import Site


class Companion(Method):
    """Governs the training of the methods beside it in one adapter, `[LoRA(), IST()]`; trains nothing of its own.

    Its site is the whole model, whose `peers` are the places of the others (the head's left out). It is no part of a
    saved adapter, only of a training run: its buffers and extra state are in the run's checkpoints.
    """

    has_sites: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True

    def count(self, site: Site) -> int:
        return 0

    @abstractmethod
    def ready(self) -> None:
        """Called before every forward of the model that may be trained on."""

    def added(self, given: Mapping[str, Any], output: Any) -> Tensor | None:
        """What is added to the loss that the model computed from labels, with gradients; None for nothing.

        `given` are the model's arguments by name, and `choices` (`inlay.core.choices`) where the caller gave them or
        None; `output` is the model's, with its loss first.
        """
        return None


@dataclass(frozen=True)
class Block:
    """What an adapter trains in one block of a network."""

    name: str
    methods: tuple[Method, ...]

    def let_train(self, on: bool) -> None:
        """Let gradients reach this block's trained tensors or not; without one an optimizer leaves a tensor alone."""
        for method in self.methods:
            method.resting = not on
            for p in method.parameters():
                p.requires_grad_(on and p.is_floating_point())
                if not on:
                    p.grad = None

    def strengthen(self, strength: float) -> None:
        """Let this block's methods act at so much of their strength."""
        for method in self.methods:
            method.strength = strength


def blocks_of(sites: Iterable[Site]) -> list[Block]:
    """The blocks in which methods act, in model order; what is in no block is left out.

    Blocks of several towers (encoder and decoder, vision and text) are told apart.
    """
    found: dict[tuple[str, int], list[Method]] = {}
    for site in sites:
        if site.depth is None:
            continue
        tower = site.name.partition("block[")[0] if "block[" in site.name else ""
        found.setdefault((tower, site.depth), []).extend(m for m in site.built.values() if isinstance(m, Method))
    return [Block(f"{tower}block[{depth}]", tuple(methods)) for (tower, depth), methods in sorted(found.items())]
