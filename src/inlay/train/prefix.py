"""The frozen prefix: blocks below the lowest trained place stand aside, and what leaves them comes from a store.

Which blocks these are is found in one forward pass: those whose forward ends before any module is called to which the
adapter is attached, that it trains, hears, or whose input it reads. No method is asked for its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.active import attached
from inlay.core.anatomy import anatomy, outwards
from inlay.core.calls import first_output, tensors_in
from inlay.core.modes import evaluating
from inlay.core.trunks import labels, stack_of
from inlay.evaluate.predict import Output, whole
from inlay.train.frozen import STATES, Frozen, Reached, Say, reached
from inlay.train.store import Pointless, Room, Unfit
from inlay.work import Work

Rest = tuple[Any, ...] | None
"""What follows the hidden states in a block's output; None where they are all of it."""


class Prefix(Frozen):
    """The model on what leaves its lowest `len(blocks)` blocks, of `total`."""

    def __init__(self, work: Work, blocks: Sequence[nn.Module], total: int, room: Room, chunk: int, say: Say) -> None:
        self.blocks, self.total = list(blocks), total
        super().__init__(work, room, chunk, say)
        if not self.by_token and "pixel_values" not in self.blank:
            raise Unfit(f"{self.name} is no one vector per token")
        self.rests = self.forms()

    @property
    def name(self) -> str:
        return f"what leaves the lowest {len(self.blocks)} of {self.total} blocks"

    @property
    def place(self) -> nn.Module:
        return self.blocks[-1]

    def inputs(self, rows: int) -> dict[str, Tensor]:
        """Black images: nothing above reads them, which `check` has seen."""
        return {name: t.expand(rows, *t.shape[1:]) for name, t in self.blank.items()}

    def above(self, batch: dict[str, Tensor]) -> Output:
        given = {name: t for name, t in batch.items() if name != STATES}
        with aside(self.blocks, self.rests, batch[STATES]):
            return self.whole.forward(given)

    def seen(self, batch: dict[str, Tensor]) -> Tensor:
        states: list[Tensor] = []

        def stop(module: nn.Module, args: tuple, output: Any) -> None:
            states.append(first_output(output))
            raise Reached

        return reached(self.work, batch, self.place.register_forward_hook(stop), states)

    def forms(self) -> list[Rest]:
        """What each block puts out after the hidden states; Unfit where that hangs on the rows."""
        found: list[Rest] = []

        def see(module: nn.Module, args: tuple, output: Any) -> None:
            rest = None if isinstance(output, Tensor) else tuple(output[1:])
            if rest is not None and (type(output) is not tuple or any(True for _ in tensors_in(rest))):
                raise Unfit(f"a {type(module).__name__} puts out more than hidden states")
            found.append(rest)

        handles = [block.register_forward_hook(see) for block in self.blocks]
        try:
            with evaluating(self.work.model):
                self.seen(self.work.batch("train", [0]))
        finally:
            for handle in handles:
                handle.remove()
        return found


@contextmanager
def aside(blocks: Sequence[nn.Module], rests: Sequence[Rest], states: Tensor) -> Iterator[None]:
    """While the context lasts these blocks compute nothing and put out `states`, each in its own form."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, rest in zip(blocks, rests, strict=True):
            block.__dict__["forward"] = standing(states if rest is None else (states, *rest))
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward


def standing(output: Any) -> Any:
    """A forward that gives this whatever it is called with."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return output

    return forward


# ---------------------------------------------------------------------- which blocks
def below(work: Work) -> tuple[list[nn.Module], int]:
    """The blocks under everything that is attached to the model, and how many there are in that stack.

    Pointless where there are none, or inlay knows no stack of blocks.
    """
    known = anatomy(work.model)
    stack = stack_of(known, labels(known)[0]) if known.n_blocks and work.prepared.prompt is None else ()
    if not stack:
        raise Pointless(f"inlay knows no one stack of blocks in {type(work.model).__name__} that everything passes")
    inlay = attached(work.model)
    touched = {*inlay.state.mounts, *inlay.state.tokens, *(entry for entry, _ in inlay.spans)}
    begun, ended = times(work)
    lowest = min(next(begun[p] for p in outwards(path) if p in begun) for path in touched)
    blocks = list(takewhile(lambda path: path in ended and ended[path] < lowest, stack))
    if not blocks:
        raise Pointless("no frozen block lies below the lowest adapted place")
    return [work.model.get_submodule(path) for path in blocks], len(stack)


@torch.no_grad()
def times(work: Work) -> tuple[dict[str, int], dict[str, int]]:
    """When each module's forward first began and last ended, in ticks of one clock, by path; those not called lack."""
    clock = count()
    begun: dict[nn.Module, int] = {}
    ended: dict[nn.Module, int] = {}

    def begin(module: nn.Module, args: tuple) -> None:
        begun.setdefault(module, next(clock))

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        ended[module] = next(clock)

    modules = dict(work.model.named_modules(remove_duplicate=False))
    handles = [handle for module in work.model.modules()
               for handle in (module.register_forward_pre_hook(begin), module.register_forward_hook(end))]  # fmt: skip
    try:
        with evaluating(work.model):
            whole(work).forward(work.batch("train", [0]))
    finally:
        for handle in handles:
            handle.remove()
    first, last = ({path: when[m] for path, m in modules.items() if m in when} for when in (begun, ended))
    return first, last
