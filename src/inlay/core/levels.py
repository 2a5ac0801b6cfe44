"""Levels: one built method at one site, how it acts in a forward, and by which of its hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inlay.core.hosts import QuantisedHost
from inlay.core.method import HiddenMethod, Method, ParameterMethod, WeightMethod
from inlay.core.sites import Site

if TYPE_CHECKING:
    from inlay.core.paths import LeanStep
    from inlay.core.routed import Group


@dataclass(eq=False)
class Level:
    """One built method at one site."""

    method: Method
    site: Site

    @property
    def head(self) -> bool:
        """Whether this is the task head trained beside the methods."""
        return self.method.kind == "head"


@dataclass(eq=False)
class Frame:
    """One running forward of a module."""

    formed: dict[str, Tensor] = field(default_factory=dict)
    """W′ and b′ for the forward to read, where forming them is the cheaper path."""
    lean: LeanStep | None = None
    """What stands for this forward in the backward pass, where that is the cheapest path."""
    inputs: list[Tensor] = field(default_factory=list)
    """Input of each level, where some act on inputs; else empty."""
    routed: dict[Group, list[Tensor]] = field(default_factory=dict)
    """The same for groups of adapters to which rows are routed, (adapters, rows, …) each."""
    read: dict[tuple[str, bool, int], Tensor] = field(default_factory=dict)
    """Closed forms read so far (with or without gradients): stacks of experts are read once per expert."""
    below: list[Level] = field(default_factory=list)
    """The levels under the one that acts on the output now, so that it can ask for the bias they give."""


def descend(levels: list[Level], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The input of each level, and that of the module below them all."""
    inputs = [x] * len(levels)
    for k in reversed(range(len(levels))):
        inputs[k] = x
        if levels[k].method.acts_before and acts_on_output(levels[k]):
            x = by_rows(levels[k], before, x)
    return inputs, x


def climb(frame: Frame, levels: list[Level], inputs: list[Tensor], y: Tensor) -> Tensor:
    """The module's output y with the levels that act on outputs, each given its input."""
    for k, (level, x) in enumerate(zip(levels, inputs, strict=True)):
        if acts_on_output(level):
            frame.below = levels[:k]
            y = by_rows(level, apply, x, y)
    frame.below = []
    return y


def fold_experts(t: Tensor, levels: list[Level]) -> Tensor:
    """A stack (experts, …) with each level applied to its expert's matrix."""
    parts = list(t.unbind(0))
    for level in levels:
        site, method = level.site, level.method
        assert isinstance(method, WeightMethod)
        assert site.expert is not None
        W = site.matrix_of(parts[site.expert])
        parts[site.expert] = site.stored_from(eased(method, W, method.weight(W)), parts[site.expert])
    return torch.stack(parts)


def acts_on_output(level: Level) -> bool:
    """Whether a level acts through its module's output rather than through the tensor the module reads."""
    if isinstance(level.method, HiddenMethod):
        return True
    return applies_matrix(level) and not reads_formed(level)


def applies_matrix(level: Level) -> bool:
    """Whether the module's own forward applies the matrix that a level adapts."""
    host = level.site.host
    return isinstance(level.method, WeightMethod) and host is not None and host.hooked


def reads_formed(level: Level) -> bool:
    """Whether such a module reads W′ in the place of W; quantised layers read their own storage."""
    formed = isinstance(level.method, WeightMethod) and level.method.formed()
    return formed and applies_matrix(level) and not isinstance(level.site.host, QuantisedHost)


def kept(level: Level) -> dict[str, Tensor]:
    """The buffers of the module of which a level has copies."""
    return level.method.states() if isinstance(level.method, ParameterMethod) else {}


def has_closed_form(method: Method) -> bool:
    """Whether base tensors can stand for the method at this moment."""
    return isinstance(method, ParameterMethod) or (isinstance(method, WeightMethod) and method.exact_now())


def apply(level: Level, x: Tensor, y: Tensor) -> Tensor:
    """One level's `after`, on its rows of a packed output."""
    method, rows = level.method, level.site.rows
    if rows is None:
        return eased(method, y, method.after(x, y))
    part = rows.take(y, -1)
    return rows.put(y, eased(method, part, method.after(x, part)), -1)


def before(level: Level, x: Tensor) -> Tensor:
    """One level's `before`."""
    return eased(level.method, x, level.method.before(x))


def eased(method: Method, plain: Tensor, adapted: Tensor) -> Tensor:
    """What becomes of `plain` where a method that would make it `adapted` acts at its present strength."""
    return adapted if method.strength == 1.0 else plain.lerp(adapted, method.strength)


def by_rows(level: Level, act: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`act(level, …)` on whole batches; row by row on nested tensors, whose rows differ in length."""
    if not tensors[-1].is_nested:
        return act(level, *tensors)
    inlay = level.site.inlay
    assert inlay is not None
    done = []
    for i, row in enumerate(zip(*(t.unbind() for t in tensors), strict=True)):
        with inlay.narrowed(torch.tensor([i], device=row[0].device)):
            done.append(act(level, *(t[None] for t in row))[0])
    return torch.nested.as_nested_tensor(done, layout=tensors[-1].layout)
