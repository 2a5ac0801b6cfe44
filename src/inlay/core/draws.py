"""Random draws of training: one per optimizer step, alike at all sites and in a resumed run; or one per forward."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn


class Draw(nn.Module):
    """A draw that follows from the number of steps taken.

    That number is part of the state dict, so an interrupted run goes on with the draw it stopped at. Before the first
    step the draw is 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_extra_state(torch.tensor(0))

    def of(self, n: int) -> int:
        """k ~ U{0, …, n − 1}."""
        return int(self.share * n)

    def next(self) -> None:
        """Draw again; call once per optimizer step."""
        self.set_extra_state(torch.tensor(self.steps + 1))

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)
        self.share = random.Random(self.steps).random() if self.steps else 0.0


def kept(shape: tuple[int, ...], share: float, like: Tensor) -> Tensor:
    """1 with probability 1 − `share` and 0 otherwise, drawn in every forward as dropout is.

    It comes from torch's own generator, whose state activation checkpointing brings back: a forward that is run again
    draws the same.
    """
    return (torch.rand(shape, device=like.device) >= share).to(like.dtype)
