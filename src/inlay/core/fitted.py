"""Methods that are fitted to frozen features at once, without gradient steps through the model."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from inlay.core.levels import Level
from inlay.core.method import HiddenMethod


@dataclass(frozen=True)
class Features:
    """What enters the task head, a vector a row, and the rows' labels."""

    x: Tensor
    """(rows, features)."""
    labels: Tensor
    """Class numbers (rows,), or values where the task is a regression."""


def vectors(x: Tensor) -> Tensor:
    """What enters a head as vectors: a map of a single place (batch, channels, 1, 1) is one."""
    return x.flatten(1) if x.dim() > 2 and x.shape[2:].numel() == 1 else x


class Fitted(HiddenMethod):
    """Fitted in one go to the features of all training rows; its only place, if any, is the task head."""

    kind: ClassVar[str] = "output"
    has_sites: ClassVar[bool] = False

    @property
    @abstractmethod
    def solves(self) -> bool:
        """Whether it is fitted by `solve`, with these options, rather than trained by gradients as other methods."""

    @abstractmethod
    def solve(self, train: Features, validation: Features, head: list[Level]) -> None:
        """Fit to the training rows; whatever is to be chosen is chosen on the validation rows.

        `head` are the trained copies of the head's tensors, if the method trains any. Raises SiteError where the head
        is of another kind than the method can be fitted in.
        """
