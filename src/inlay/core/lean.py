"""The lean path of a training step: W′ is formed, used and let go; only x is kept for the backward pass.

The module computes x W′ᵀ + b by itself, without a graph. One function then stands for it: its backward pass forms W′
again for the gradient of x, and asks each method's `Form` for the gradients of its tensors, which for a structured
update need no product of the full size. Autograd on W′ would keep it and compute the gradient of all of W; adding
x Δᵀ to an output makes passes over all activations, forward and backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.leaves import Leaves
from inlay.core.matrices import Matrix
from inlay.core.rows import Rows

PASS = 30
"""Flops in whose time one number is read or written, where a product is at its best."""


Gradients = tuple[Tensor | None, list[Tensor | None]]


class Form(Leaves, ABC):
    """W ↦ W′ (d_out, d_in) as a function of tensors of its own."""

    adds: ClassVar[bool] = False
    """Whether it adds to W, whatever W is: only such forms act one on the other, or on parts of one matrix."""
    wants_output: ClassVar[bool] = False
    """Whether `backward` reads the output."""

    @abstractmethod
    def formed(self, W: Tensor) -> Tensor:
        """W′ in the type of W."""

    @abstractmethod
    def backward(self, W: Tensor, x: Tensor, g: Tensor, y: Tensor | None, for_x: bool) -> Gradients:
        """Gradients of x, if wanted, and of the leaves, where y = x W′ᵀ has g; x (n, d_in), g and y (n, d_out)."""

    @abstractmethod
    def lean_flops(self, tokens: int) -> int:
        """What a step costs with this form beyond what the frozen layer does."""

    @abstractmethod
    def factored_flops(self, tokens: int) -> int:
        """What a step costs where the method acts on outputs instead."""


class Added(Form):
    """W′ = W + Δ."""

    adds = True

    def __init__(self, delta: Matrix) -> None:
        self.delta = delta

    def formed(self, W: Tensor) -> Tensor:
        return self.delta.added_to(W)

    def backward(self, W: Tensor, x: Tensor, g: Tensor, y: Tensor | None, for_x: bool) -> Gradients:
        return g @ self.formed(W) if for_x else None, self.delta.pullback(x, g)

    def lean_flops(self, tokens: int) -> int:
        return self.delta.pullback_flops(tokens) + 2 * (self.delta.dense_flops() + 3 * PASS * prod(self.delta.shape))

    def factored_flops(self, tokens: int) -> int:
        moved = tokens * sum(self.delta.shape)  # added to outputs, and to gradients of inputs
        return 3 * self.delta.flops(tokens) + PASS * (2 * moved + 3 * self.delta.moved(tokens))


class RowScaled(Form):
    """W′ = diag(c) (W + Δ)."""

    wants_output = True

    def __init__(self, c: Tensor, delta: Matrix) -> None:
        self.c, self.delta = c, delta

    def formed(self, W: Tensor) -> Tensor:
        return self.delta.added_to(W).mul_(self.c.to(W.dtype)[:, None])

    def backward(self, W: Tensor, x: Tensor, g: Tensor, y: Tensor | None, for_x: bool) -> Gradients:
        assert y is not None
        c = divisor = self.c.to(g.dtype)
        if bool((c == 0).any()):  # y does not tell x (W + Δ)ᵀ
            y, divisor = F.linear(x, self.delta.added_to(W)), torch.ones_like(c)
        for_c = torch.linalg.vecdot(g, y, dim=0) / divisor
        for_x_ = g @ self.formed(W) if for_x else None
        return for_x_, [for_c.to(self.c.dtype), *self.delta.pullback(x, g * c)]

    def lean_flops(self, tokens: int) -> int:
        return Added(self.delta).lean_flops(tokens) + 5 * PASS * tokens * self.delta.shape[0]

    def factored_flops(self, tokens: int) -> int:
        return Added(self.delta).factored_flops(tokens) + 10 * PASS * tokens * self.delta.shape[0]


class Packed(Form):
    """Several forms that add to W one after the other, each on its rows."""

    adds = True

    def __init__(self, forms: tuple[Form, ...], rows: tuple[Rows | None, ...]) -> None:
        self.forms, self.rows = forms, rows

    def formed(self, W: Tensor) -> Tensor:
        for rows, form in zip(self.rows, self.forms, strict=True):
            W = form.formed(W) if rows is None else rows.put(W, form.formed(rows.take(W, 0)), 0)
        return W

    def backward(self, W: Tensor, x: Tensor, g: Tensor, y: Tensor | None, for_x: bool) -> Gradients:
        found: list[Tensor | None] = []
        for rows, form in zip(self.rows, self.forms, strict=True):
            own, part = (W, g) if rows is None else (rows.take(W, 0), rows.take(g, -1))
            found += form.backward(own, x, part, None, False)[1]
        return g @ self.formed(W) if for_x else None, found

    def lean_flops(self, tokens: int) -> int:
        return sum(form.lean_flops(tokens) for form in self.forms)

    def factored_flops(self, tokens: int) -> int:
        return sum(form.factored_flops(tokens) for form in self.forms)


class Through(torch.autograd.Function):
    """y = x W′ᵀ + b, computed without a graph, as a function of x and of the form's leaves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(form: Form, x: Tensor, y: Tensor, W: Tensor, b: Tensor | None, *leaves: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.form, x, _, W, b, *leaves = inputs
        ctx.save_for_backward(x, W, *((output, b) if ctx.form.wants_output else (None, None)), *leaves)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, y, b, *leaves = ctx.saved_tensors
        _, for_x, _, _, _, *wanted = ctx.needs_input_grad
        if y is not None:
            y = (y if b is None else y - b).flatten(0, -2)
        form = ctx.form.made_of(leaves)
        dx, found = form.backward(W, x.flatten(0, -2), g.flatten(0, -2), y, for_x)
        dx = dx if dx is None else dx.view(x.shape)
        return None, dx, None, None, None, *(d if want else None for d, want in zip(found, wanted, strict=True))
