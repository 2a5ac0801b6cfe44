"""Which rows each step sees: a function of the seed and the step's number, so that a run resumes anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

_WINDOW = 16  # steps whose rows are sorted by length together; more would make batches alike from epoch to epoch


@dataclass(frozen=True)
class Order:
    """A fresh permutation of `rows` rows per epoch, dealt to steps of `per_step` rows; the last step may be smaller.

    With `lengths`, rows of similar length are put into the same step, within windows of 16 steps: less padding, the
    same rows per epoch. The steps of a window are taken in random order.
    """

    rows: int
    per_step: int
    seed: int
    lengths: tuple[int, ...] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.per_step)

    def step(self, number: int) -> list[int]:
        """The rows of step `number`, counted from 0 across epochs."""
        epoch, index = divmod(number, self.steps_per_epoch)
        return epoch_steps(self, epoch)[index]

    def longest(self, count: int) -> list[int]:
        """The `count` longest rows (the first ones where lengths are not known): the batch that needs most memory."""
        if self.lengths is None:
            return list(range(min(count, self.rows)))
        return sorted(range(self.rows), key=lambda i: (-self.lengths[i], i))[:count]  # type: ignore[index]


@lru_cache(maxsize=2)
def epoch_steps(order: Order, epoch: int) -> list[list[int]]:
    """All steps of one epoch."""
    generator = torch.Generator().manual_seed(mixed(order.seed, epoch))
    rows = torch.randperm(order.rows, generator=generator).tolist()
    size = order.per_step
    if order.lengths is None:
        return split(rows, size)
    steps = []
    for window in split(rows, size * _WINDOW):
        window.sort(key=order.lengths.__getitem__)
        parts = split(window, size)
        steps += [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]
    return steps


def split(rows: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive parts of `size`, the last one possibly smaller."""
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def mixed(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    value = 0x9E3779B97F4A7C15
    for number in numbers:
        value = ((value ^ number) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        value ^= value >> 31
    return value >> 1
