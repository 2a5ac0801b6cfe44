"""The task head trained beside any method."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from inlay.core.method import ParameterMethod


class Head(ParameterMethod):
    """h(x) = h_trained(x): the task head's own tensors, copied and trained.

    Not in the catalogue: every method has one beside it when the model has a task head, and tables count it apart.
    """

    kind: ClassVar[str] = "head"
    paper: ClassVar[str] = "task head"

    unit = 1.0
    """What a step of the learning rate is measured in: 1, or the deviation of a regression's labels."""

    def wants(self, module: nn.Module, name: str) -> bool:
        return True
