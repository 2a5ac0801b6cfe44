"""Methods that transform W rather than add to it, and the linear maps they are made of.

W′ = L W R with structured square maps: R meets the module's input and L its output, so that W′ is not formed. Where
neither can be reached (R at a convolution, whose matrix reads patches, or at one part of a packed matrix), and for
methods that are any other function of W, the module reads W′ in the place of W and computes once with that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from inlay.core.hosts import ConvHost
from inlay.core.lean import PASS, Form, Gradients, Pass
from inlay.core.leaves import Leaves, gradients
from inlay.core.matrices import Dense
from inlay.core.method import WeightMethod


# ---------------------------------------------------------------------- maps
class Map(Leaves, ABC):
    """A square matrix M that acts on the last axis. Factors keep their own type and are cast to that of the vectors."""

    @property
    @abstractmethod
    def moves(self) -> int:
        """Numbers that `of` reads and writes for every coordinate."""

    @abstractmethod
    def of(self, x: Tensor) -> Tensor:
        """M x for every vector x (…, d), in the type of x."""

    @abstractmethod
    def transposed(self) -> Map:
        """Mᵀ."""


class Scale(Map):
    """diag(s)."""

    def __init__(self, s: Tensor) -> None:
        self.s = s

    @property
    def moves(self) -> int:
        return 2

    def of(self, x: Tensor) -> Tensor:
        return x * self.s.to(x.dtype)

    def transposed(self) -> Map:
        return self


class Blocks(Map):
    """P diag(B₁, …, B_n) Pᵀ, blocks (n, b, b); one block alone is used for every part.

    `order` is Pᵀ as indices, and `back` those of P: the j-th coordinate that the blocks see is x[order[j]]. None: I.
    """

    def __init__(self, blocks: Tensor, order: Tensor | None = None, back: Tensor | None = None) -> None:
        self.blocks, self.order, self.back = blocks, order, back

    @property
    def moves(self) -> int:
        return 4 if self.order is None else 8

    def of(self, x: Tensor) -> Tensor:
        B = self.blocks.to(x.dtype)
        seen = x if self.order is None else x[..., self.order]
        parts = seen.unflatten(-1, (-1, B.shape[-1]))
        if B.shape[0] == 1:
            out = (parts @ B[0].mT).flatten(-2)
        else:
            out = torch.bmm(parts.reshape(-1, *parts.shape[-2:]).transpose(0, 1), B.mT).transpose(0, 1).reshape(x.shape)
        return out if self.back is None else out[..., self.back]

    def transposed(self) -> Map:
        return Blocks(self.blocks.mT, self.order, self.back)

    @property
    def plain(self) -> bool:
        """Whether every block is one of its own and sees its coordinates as they lie."""
        return self.order is None and self.blocks.shape[0] * self.blocks.shape[-1] > self.blocks.shape[-1]


class Reflections(Map):
    """Block by block  I + Σ_k s_k û_k û_kᵀ  with û = u/‖u‖, every u (n, d/n) and its sign s_k ±1 or ±2."""

    def __init__(self, *terms: tuple[float, Tensor]) -> None:
        self.terms = [(s, u / torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp_min(1e-12)) for s, u in terms]

    @property
    def moves(self) -> int:
        return 10 * len(self.terms)

    def of(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, tuple(self.terms[0][1].shape))
        out = parts
        for s, u in self.terms:
            u = u.to(x.dtype)
            out = out + s * (parts * u).sum(-1, keepdim=True) * u
        return out.flatten(-2)

    def transposed(self) -> Map:
        return self


class Pairs(Map):
    """2×2 blocks on coordinates i and i + g/2 of every group of g: x ⊙ c₁ + rot(x) ⊙ c₂, rot(x₁, x₂) = (−x₂, x₁).

    c₁ and c₂ are as long as the whole groups; coordinates after the last one stay as they are.
    """

    def __init__(self, c1: Tensor, c2: Tensor, group: int) -> None:
        self.c1, self.c2, self.group = c1, c2, group

    @property
    def moves(self) -> int:
        return 14

    def of(self, x: Tensor) -> Tensor:
        n = self.c1.shape[0]
        head = x if n == x.shape[-1] else x[..., :n]
        out = head * self.c1.to(x.dtype) + self.turned(head) * self.c2.to(x.dtype)
        return out if head is x else torch.cat([out, x[..., n:]], -1)

    def turned(self, x: Tensor) -> Tensor:
        first, second = x.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)
        return torch.stack([-second, first], -2).flatten(-3)

    def transposed(self) -> Map:
        first, second = self.c2.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)
        return Pairs(self.c1, -torch.stack([second, first], -2).flatten(-3), self.group)


class Plus(Map):
    """I + M; exactly I where M is zero."""

    def __init__(self, M: Map) -> None:
        self.M = M

    @property
    def moves(self) -> int:
        return 2 + self.M.moves

    def of(self, x: Tensor) -> Tensor:
        return x + self.M.of(x)

    def transposed(self) -> Map:
        return Plus(self.M.transposed())


class Product(Map):
    """M_k … M₂ M₁, the first map first."""

    def __init__(self, *maps: Map) -> None:
        self.maps = maps

    @property
    def moves(self) -> int:
        return sum(one.moves for one in self.maps)

    def of(self, x: Tensor) -> Tensor:
        for one in self.maps:
            x = one.of(x)
        return x

    def transposed(self) -> Map:
        return Product(*(one.transposed() for one in reversed(self.maps)))


# ---------------------------------------------------------------------- the lean path
class Turned(Form):
    """W′ = W R with blocks R_i: the gradient of x passes through W x′ᵀ, x′ = R x, which is that of R as well."""

    def __init__(self, R: Blocks) -> None:
        self.R = R

    def formed(self, W: Tensor) -> Tensor:
        return self.R.transposed().of(W)  # rows: w ↦ w R

    def backward(self, at: Pass) -> Gradients:
        blocks = self.R.blocks
        turned = at.g @ at.W  # of x′
        parts = [t.unflatten(-1, blocks.shape[:2]).transpose(0, 1) for t in (turned, at.x)]  # (blocks, n, b)
        gradient = parts[0].mT @ parts[1]
        return self.R.transposed().of(turned) if at.for_x else None, [gradient.to(blocks.dtype)]

    def lean_flops(self, tokens: int) -> int:
        n = self.R.blocks.shape[0] * self.R.blocks.shape[-1]
        return 4 * tokens * self.R.blocks.numel() + PASS * tokens * 3 * n

    def factored_flops(self, tokens: int) -> int:
        n = self.R.blocks.shape[0] * self.R.blocks.shape[-1]
        return 6 * tokens * self.R.blocks.numel() + PASS * tokens * 6 * n


class Mapped(Form):
    """W′ = L W R, b′ = b or L b: the gradient of W′ in full, and from it those of the maps."""

    def __init__(self, L: Map | None, R: Map | None, turns_bias: bool, shape: tuple[int, int]) -> None:
        self.L, self.R, self.turns_bias, self.shape = L, R, turns_bias, shape

    def formed(self, W: Tensor) -> Tensor:
        W = W if self.R is None else self.R.transposed().of(W)  # rows: w ↦ w R
        return W if self.L is None else self.L.of(W.mT).mT

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.L is None or not self.turns_bias else self.L.of(b)

    def backward(self, at: Pass) -> Gradients:
        with torch.enable_grad():
            own = self.made_of([t.view_as(t) for t in self.leaves()])
            W, b = own.formed(at.W), own.bias(at.b)
        made, known = [W], [at.g.mT @ at.x]
        if b is not None and b is not at.b:
            made, known = [W, b], [*known, at.g.sum(0)]
        found = gradients(made, own.leaves(), known)
        return at.g @ (W if torch.is_grad_enabled() else W.detach()) if at.for_x else None, found

    def moved(self) -> int:
        """Numbers read and written for every row, where the maps act on inputs and outputs."""
        left = 0 if self.L is None else self.L.moves * self.shape[0] + (0 if self.turns_bias else 2 * self.shape[0])
        return left + (0 if self.R is None else self.R.moves * self.shape[1])

    def lean_flops(self, tokens: int) -> int:
        return 2 * tokens * prod(self.shape) + 2 * PASS * prod(self.shape) * max(1, self.moved() // sum(self.shape))

    def factored_flops(self, tokens: int) -> int:
        return 3 * PASS * tokens * self.moved()


# ---------------------------------------------------------------------- families
class FormedMethod(WeightMethod):
    """W′ = f(W) with no cheaper form than itself; of the site's matrix, so it comes first there."""

    reads_weight: ClassVar[bool] = True

    def formed(self) -> bool:
        return True

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return beside(self, x, y)


class TransformMethod(WeightMethod):
    """W′ = L W R with the maps that a method states."""

    turns_bias: ClassVar[bool] = False
    """Whether L acts on the bias as well, b′ = L b."""

    def left(self) -> Map | None:
        """L (d_out, d_out); None for the identity."""
        return None

    def right(self) -> Map | None:
        """R (d_in, d_in); None for the identity."""
        return None

    def turns_input(self) -> bool:
        """Whether there is an R at this site."""
        return False

    def formed(self) -> bool:
        return self.turns_input() and (isinstance(self.site.host, ConvHost) or self.site.rows is not None)

    def weight(self, W: Tensor) -> Tensor:
        L, R, wide = self.left(), self.right(), W.to(torch.promote_types(W.dtype, self.site.dtype))
        if R is not None:
            wide = R.transposed().of(wide)  # rows: w ↦ w R
        if L is not None:
            wide = L.of(wide.mT).mT
        return wide.to(W.dtype)

    def form(self) -> Form | None:
        if self.formed():
            return None
        L, R = self.left(), self.right() if self.turns_input() else None
        if L is None and isinstance(R, Blocks) and R.plain:
            return Turned(R)
        return Mapped(L, R, self.turns_bias, self.site.shape)

    def bias_of(self, b: Tensor | None) -> Tensor | None:
        L = self.left() if self.turns_bias else None
        return b if b is None or L is None else L.of(b)

    def before(self, x: Tensor) -> Tensor:
        R = self.right() if self.turns_input() and not self.formed() else None
        return x if R is None else R.of(x)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if self.formed():
            return beside(self, x, y)
        L = self.left()
        if L is None:
            return y
        bias = None if self.turns_bias else self.site.current_bias
        if bias is not None:
            y = y - self.site.outward(bias, y)
        host = self.site.host
        features = -1 - host.axes if isinstance(host, ConvHost) else -1
        y = L.of(y.movedim(features, -1)).movedim(-1, features)
        return y if bias is None else y + self.site.outward(bias, y)


def beside(method: WeightMethod, x: Tensor, y: Tensor) -> Tensor:
    """y with W′ and b′ in the place of W and b, for modules that must read their own storage (quantised layers)."""
    site = method.site
    W = site.weight
    wide = W.to(torch.promote_types(W.dtype, site.dtype))
    y = site.add(Dense(method.weight(wide) - wide), x, y)
    bias = site.current_bias
    new = method.bias_of(bias)
    return y if bias is None or new is None or new is bias else y + site.outward(new - bias, y)
