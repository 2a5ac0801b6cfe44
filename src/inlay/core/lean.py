"""The lean path of a training step: W′ is formed, used and let go; only x is kept for the backward pass.

The module computes x W′ᵀ + b by itself, without a graph. One function then stands for it: its backward pass forms W′
again for the gradient of x, and asks each method's `Form` for the gradients of its tensors, which for a structured
update need no product of the full size. Autograd on W′ would keep it and compute the gradient of all of W; adding
x Δᵀ to an output makes passes over all activations, forward and backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.hollow import hollow
from inlay.core.leaves import Leaves
from inlay.core.matrices import Matrix
from inlay.core.rows import Rows

PASS = 30
"""Flops in whose time one number is read or written, where a product is at its best."""


Gradients = tuple[Tensor | None, list[Tensor | None]]
"""Of x, if it wants one, and of a form's leaves."""


class Pass(NamedTuple):
    """What the backward pass of y = x W′ᵀ + b′ has at hand."""

    W: Tensor
    """(d_out, d_in), as the base holds it."""
    b: Tensor | None
    x: Tensor
    """(n, d_in)."""
    g: Tensor
    """The gradient of y, (n, d_out)."""
    y: Tensor
    """(n, d_out); empty unless the form wants it."""
    for_x: bool
    """Whether x wants a gradient."""


class Form(Leaves, ABC):
    """W ↦ W′ (d_out, d_in) as a function of tensors of its own."""

    adds: ClassVar[bool] = False
    """Whether it adds to W, whatever W is: only such forms act one on the other, or on parts of one matrix."""
    wants_input: ClassVar[bool] = True
    """Whether `backward` reads x."""
    wants_output: ClassVar[bool] = False
    """Whether it reads y."""

    @abstractmethod
    def formed(self, W: Tensor) -> Tensor:
        """W′ in the type of W."""

    def bias(self, b: Tensor | None) -> Tensor | None:
        """b ↦ b′."""
        return b

    @abstractmethod
    def backward(self, at: Pass) -> Gradients:
        """Gradients of x and of the leaves."""

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

    def backward(self, at: Pass) -> Gradients:
        return at.g @ self.formed(at.W) if at.for_x else None, self.delta.pullback(at.x, at.g)

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

    def backward(self, at: Pass) -> Gradients:
        c, y = self.c.to(at.g.dtype), at.y if at.b is None else at.y - at.b
        divisor = c
        if not hollow(c) and not bool(c.all()):  # y does not tell x (W + Δ)ᵀ
            y, divisor = F.linear(at.x, self.delta.added_to(at.W)), torch.ones_like(c)
        for_c = torch.linalg.vecdot(at.g, y, dim=0) / divisor
        for_x = at.g @ self.formed(at.W) if at.for_x else None
        return for_x, [for_c.to(self.c.dtype), *self.delta.pullback(at.x, at.g * c)]

    def lean_flops(self, tokens: int) -> int:
        return Added(self.delta).lean_flops(tokens) + 5 * PASS * tokens * self.delta.shape[0]

    def factored_flops(self, tokens: int) -> int:
        return Added(self.delta).factored_flops(tokens) + 10 * PASS * tokens * self.delta.shape[0]


class Gain(Form):
    """W′ = diag(c) W, b′ = c ⊙ b + β: y alone tells the gradients, where no c is zero."""

    wants_input = False
    wants_output = True

    def __init__(self, c: Tensor, shift: Tensor | None = None) -> None:
        self.c, self.shift = c, shift

    def formed(self, W: Tensor) -> Tensor:
        return self.c.to(W.dtype)[:, None] * W

    def bias(self, b: Tensor | None) -> Tensor | None:
        if b is None:
            return None
        c = self.c.to(b.dtype)
        return c * b if self.shift is None else torch.addcmul(self.shift.to(b.dtype), c, b)

    def backward(self, at: Pass) -> Gradients:
        c = self.c.to(at.g.dtype)
        y = at.y if self.shift is None else at.y - self.shift.to(c.dtype)
        found = [(torch.linalg.vecdot(at.g, y, dim=0) / c).to(self.c.dtype)]
        if self.shift is not None:
            found.append(at.g.sum(0).to(self.shift.dtype))
        return at.g @ self.formed(at.W) if at.for_x else None, [*found]

    def lean_flops(self, tokens: int) -> int:
        return PASS * tokens * 2 * self.c.numel()

    def factored_flops(self, tokens: int) -> int:
        return PASS * tokens * 6 * self.c.numel()


class ColumnGain(Form):
    """W′ = W diag(c)."""

    def __init__(self, c: Tensor) -> None:
        self.c = c

    def formed(self, W: Tensor) -> Tensor:
        return W * self.c.to(W.dtype)

    def backward(self, at: Pass) -> Gradients:
        scaled = at.g @ at.W  # the gradient of c ⊙ x
        for_c = torch.linalg.vecdot(scaled, at.x, dim=0).to(self.c.dtype)
        return scaled * self.c.to(scaled.dtype) if at.for_x else None, [for_c]

    def lean_flops(self, tokens: int) -> int:
        return PASS * tokens * 5 * self.c.numel()

    def factored_flops(self, tokens: int) -> int:
        return PASS * tokens * 7 * self.c.numel()


class Packed(Form):
    """Several forms that add to W one after the other, each on its rows."""

    adds = True

    def __init__(self, forms: tuple[Form, ...], rows: tuple[Rows | None, ...]) -> None:
        self.forms, self.rows = forms, rows

    def formed(self, W: Tensor) -> Tensor:
        for rows, form in zip(self.rows, self.forms, strict=True):
            W = form.formed(W) if rows is None else rows.put(W, form.formed(rows.take(W, 0)), 0)
        return W

    def backward(self, at: Pass) -> Gradients:
        found: list[Tensor | None] = []
        for rows, form in zip(self.rows, self.forms, strict=True):
            own = at._replace(for_x=False)
            if rows is not None:
                own = own._replace(W=rows.take(at.W, 0), g=rows.take(at.g, -1))
            found += form.backward(own)[1]
        return at.g @ self.formed(at.W) if at.for_x else None, found

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
        x, y = x if ctx.form.wants_input else None, output if ctx.form.wants_output else None
        ctx.save_for_backward(x, W, b, y, *leaves)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, b, y, *leaves = ctx.saved_tensors
        _, for_x, _, _, _, *wanted = ctx.needs_input_grad
        x2, g2, y2 = (g.new_empty(0) if t is None else t.flatten(0, -2) for t in (x, g, y))
        dx, found = ctx.form.made_of(leaves).backward(Pass(W, b, x2, g2, y2, for_x))
        dx = dx if dx is None else dx.view(*g.shape[:-1], -1)
        return None, dx, None, None, None, *(d if want else None for d, want in zip(found, wanted, strict=True))
