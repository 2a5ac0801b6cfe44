"""Structured updates Δ ∈ R^{d_out×d_in}: how to apply, add, measure and form them without forming them first.

Every matrix acts on row batches, `apply(x) = x Δᵀ`, the layout of `nn.Linear.weight`. Factors keep their own
dtype (float32 for trained adapters) and are cast to that of `x` when they are applied, so a bfloat16 base computes
in bfloat16 and `dense()` merges in full precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.leaves import Leaves, gradients, transformed


class Matrix(Leaves, ABC):
    """A structured matrix of `shape` (d_out, d_in)."""

    shape: tuple[int, int]

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """x Δᵀ for x of shape (…, d_in); returns (…, d_out) in the dtype of x."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Δ itself, (d_out, d_in), in the dtype of its factors."""

    @abstractmethod
    def row_dot(self, W: Tensor) -> Tensor:
        """⟨W_i, Δ_i⟩ for every row i, (d_out,), without forming Δ where the structure allows."""

    @abstractmethod
    def row_squares(self) -> Tensor:
        """‖Δ_i‖² for every row i, (d_out,)."""

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Multiply-adds × 2 of `apply` on that many rows."""

    @abstractmethod
    def dense_flops(self) -> int:
        """Multiply-adds × 2 of `dense`."""

    @abstractmethod
    def columns(self, ids: Tensor) -> Tensor:
        """Δ[:, ids]ᵀ for integer ids (…); returns (…, d_out): the update of an embedding look-up."""

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y + x Δᵀ."""
        return y + self.apply(x)

    def squared_row_norms(self, W: Tensor, squares: Tensor) -> Tensor:
        """‖(W + Δ)_i‖² from the cached squares ‖W_i‖², without forming W + Δ."""
        return squares + 2 * self.row_dot(W) + self.row_squares()

    def added_to(self, W: Tensor) -> Tensor:
        """W + Δ, a tensor of its own in the type of W."""
        return W + self.dense().to(W.dtype)

    def moved(self, tokens: int) -> int:
        """Numbers that `apply` puts in another order between its products."""
        return 0

    @property
    def remembers_input(self) -> bool:
        """Whether the gradients of its tensors need all of x; else a few numbers per row of x do."""
        return True

    def pullback(self, x: Tensor, g: Tensor) -> list[Tensor | None]:
        """Gradients of the leaves where x Δᵀ has the gradient g; x (n, d_in), g (n, d_out)."""
        with torch.enable_grad():
            leaves = [t.view_as(t) for t in self.leaves()]
            dense = self.made_of(leaves).dense()
        return gradients([dense], leaves, [(g.T @ x).to(dense.dtype)])

    def pullback_flops(self, tokens: int) -> int:
        """Multiply-adds × 2 of `pullback`."""
        return 2 * tokens * prod(self.shape) + 3 * self.dense_flops()

    def scaled(self, s: float | Tensor) -> Matrix:
        return Scaled(self, s)

    def __add__(self, other: Matrix) -> Matrix:
        return Sum((self, other))


class Dense(Matrix):
    """Δ = D, stored in full."""

    def __init__(self, D: Tensor) -> None:
        self.D = D
        self.shape = (D.shape[0], D.shape[1])

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.D.to(x.dtype))

    def dense(self) -> Tensor:
        return self.D

    def row_dot(self, W: Tensor) -> Tensor:
        return (W * self.D).sum(1)

    def row_squares(self) -> Tensor:
        return self.D.square().sum(1)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * prod(self.shape)

    def dense_flops(self) -> int:
        return 0

    def columns(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.D.T)


def addmm(y: Tensor, h: Tensor, B: Tensor, s: float) -> Tensor:
    """y + s h Bᵀ."""
    return torch.addmm(y, h, B.T, alpha=s)


class AddProduct(torch.autograd.Function):
    """The same, in one pass over y under `torch.vmap` too, which takes an addmm apart."""

    @staticmethod
    def forward(y: Tensor, h: Tensor, B: Tensor, s: float) -> Tensor:
        return addmm(y, h, B, s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
        _, h, B, ctx.s = inputs
        ctx.save_for_backward(h, B)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, B = ctx.saved_tensors
        _, for_h, for_B, _ = ctx.needs_input_grad
        dh = ((g @ B.to(g.dtype)) * ctx.s).to(h.dtype) if for_h else None
        return g, dh, (g.mT @ (h.to(g.dtype) * ctx.s)).to(B.dtype) if for_B else None, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], y: Tensor, h: Tensor, B: Tensor, s: float) -> tuple[Tensor, int]:
        y, h, B = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((y, h, B), dims, strict=False)
        )
        return torch.baddbmm(y, h, B.mT, alpha=s), 0


class LowRank(Matrix):
    """Δ = s · B A with B (d_out, r) and A (r, d_in)."""

    def __init__(self, B: Tensor, A: Tensor, scale: float = 1.0) -> None:
        self.B, self.A, self.scale = B, A, scale
        self.shape = (B.shape[0], A.shape[1])

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.A.to(x.dtype))
        # the scale goes where the fewest numbers are: h is (…, r)
        return F.linear(h if self.scale == 1.0 else h * self.scale, self.B.to(x.dtype))

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.is_nested:
            return y + self.apply(x)
        h = F.linear(x, self.A.to(x.dtype)).flatten(0, -2)
        add = AddProduct.apply if not torch.compiler.is_compiling() and transformed() else addmm
        return add(y.flatten(0, -2), h, self.B.to(x.dtype), self.scale).view(y.shape)

    def dense(self) -> Tensor:
        return self.scale * (self.B @ self.A)

    def added_to(self, W: Tensor) -> Tensor:
        return torch.addmm(W, self.B.to(W.dtype), self.A.to(W.dtype), alpha=self.scale)

    def pullback(self, x: Tensor, g: Tensor) -> list[Tensor | None]:
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        dA: Tensor | None = None
        dB: Tensor | None = None
        D = None if self.pulls_apart(len(x)) else g.T @ x
        if self.B.requires_grad:
            dB = (self.scale * (g.T @ (x @ A.T) if D is None else D @ A.T)).to(self.B.dtype)
        if self.A.requires_grad:
            dA = (self.scale * ((g @ B).T @ x if D is None else B.T @ D)).to(self.A.dtype)
        return [dB, dA]

    @property
    def remembers_input(self) -> bool:
        return self.A.requires_grad

    def pulls_apart(self, tokens: int) -> bool:
        """Whether four thin products cost less than the one that is Δ's full gradient."""
        return 2 * self.flops(tokens) < 2 * tokens * prod(self.shape)

    def pullback_flops(self, tokens: int) -> int:
        return min(2 * self.flops(tokens), 2 * tokens * prod(self.shape) + 2 * self.dense_flops())

    def row_dot(self, W: Tensor) -> Tensor:
        return self.scale * ((W.to(self.A.dtype) @ self.A.T) * self.B).sum(1)

    def row_squares(self) -> Tensor:
        return self.scale**2 * ((self.B @ (self.A @ self.A.T)) * self.B).sum(1)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.rank * sum(self.shape)

    def dense_flops(self) -> int:
        return 2 * self.rank * prod(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        return F.linear(F.embedding(ids, self.A.T), self.B) * self.scale


class Diagonal(Matrix):
    """Δ = diag(d), square."""

    def __init__(self, d: Tensor) -> None:
        self.d = d
        self.shape = (d.numel(), d.numel())

    def apply(self, x: Tensor) -> Tensor:
        return x * self.d.to(x.dtype)

    def dense(self) -> Tensor:
        return torch.diag(self.d)

    def row_dot(self, W: Tensor) -> Tensor:
        return W.diagonal() * self.d

    def row_squares(self) -> Tensor:
        return self.d.square()

    def flops(self, tokens: int) -> int:
        return tokens * self.shape[0]

    def dense_flops(self) -> int:
        return 0

    def columns(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids, self.shape[1]) * self.d[ids].unsqueeze(-1)


class BlockDiagonal(Matrix):
    """Δ = diag(D₁, …, D_n) with blocks (n, m_out, m_in), cut to `shape` where the blocks do not divide it."""

    def __init__(self, blocks: Tensor, shape: tuple[int, int] | None = None) -> None:
        self.blocks = blocks
        n, m_out, m_in = blocks.shape
        self.whole = (n * m_out, n * m_in)
        self.shape = shape or self.whole

    def apply(self, x: Tensor) -> Tensor:
        n, _, m_in = self.blocks.shape
        X = F.pad(x, (0, self.whole[1] - self.shape[1])).unflatten(-1, (n, m_in))
        return torch.einsum("...ni,noi->...no", X, self.blocks.to(x.dtype)).flatten(-2)[..., : self.shape[0]]

    def dense(self) -> Tensor:
        return torch.block_diag(*self.blocks)[: self.shape[0], : self.shape[1]]

    def row_dot(self, W: Tensor) -> Tensor:
        n, m_out, m_in = self.blocks.shape
        W = F.pad(W, (0, self.whole[1] - self.shape[1], 0, self.whole[0] - self.shape[0]))
        diagonal = W.view(n, m_out, n, m_in).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return (diagonal * self.blocks).sum(-1).flatten()[: self.shape[0]]

    def row_squares(self) -> Tensor:
        n, _, m_in = self.blocks.shape
        inside = torch.arange(n * m_in, device=self.blocks.device).view(n, 1, m_in) < self.shape[1]
        return (self.blocks * inside).square().sum(-1).flatten()[: self.shape[0]]

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.blocks.numel()

    def dense_flops(self) -> int:
        return self.blocks.numel()

    def columns(self, ids: Tensor) -> Tensor:
        n, _, m_in = self.blocks.shape
        block, column = ids // m_in, ids % m_in
        values = self.blocks[block, :, column]  # (…, m_out)
        return (F.one_hot(block, n).unsqueeze(-1) * values.unsqueeze(-2)).flatten(-2)[..., : self.shape[0]]


class Sparse(Matrix):
    """Δ_{rows[k], cols[k]} = values[k], zero elsewhere; positions are distinct."""

    def __init__(self, rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        self.rows, self.cols, self.values, self.shape = rows, cols, values, shape

    def apply(self, x: Tensor) -> Tensor:
        y = x.new_zeros(*x.shape[:-1], self.shape[0])
        return y.index_add(-1, self.rows, x[..., self.cols] * self.values.to(x.dtype))

    def dense(self) -> Tensor:
        return self.values.new_zeros(self.shape).index_put((self.rows, self.cols), self.values)

    def row_dot(self, W: Tensor) -> Tensor:
        return self.values.new_zeros(self.shape[0]).index_add(0, self.rows, W[self.rows, self.cols] * self.values)

    def row_squares(self) -> Tensor:
        return self.values.new_zeros(self.shape[0]).index_add(0, self.rows, self.values.square())

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.values.numel()

    def dense_flops(self) -> int:
        return self.values.numel()

    def columns(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.dense().T)


class Sum(Matrix):
    """Δ = Σ Δ_k."""

    def __init__(self, terms: tuple[Matrix, ...]) -> None:
        if len({t.shape for t in terms}) != 1:
            raise ValueError(f"a sum needs matrices of one shape, got {[t.shape for t in terms]}")
        self.terms, self.shape = terms, terms[0].shape

    def apply(self, x: Tensor) -> Tensor:
        y = self.terms[0].apply(x)
        for term in self.terms[1:]:
            y = term.add_to(y, x)
        return y

    def dense(self) -> Tensor:
        return torch.stack([t.dense() for t in self.terms]).sum(0)

    def row_dot(self, W: Tensor) -> Tensor:
        return torch.stack([t.row_dot(W) for t in self.terms]).sum(0)

    def row_squares(self) -> Tensor:
        return self.dense().square().sum(1)  # the terms' cross products need one of each pair formed

    def pullback(self, x: Tensor, g: Tensor) -> list[Tensor | None]:
        return [d for t in self.terms for d in t.pullback(x, g)]

    def pullback_flops(self, tokens: int) -> int:
        return sum(t.pullback_flops(tokens) for t in self.terms)

    @property
    def remembers_input(self) -> bool:
        return any(t.remembers_input for t in self.terms)

    def flops(self, tokens: int) -> int:
        return sum(t.flops(tokens) for t in self.terms)

    def dense_flops(self) -> int:
        return sum(t.dense_flops() + prod(t.shape) for t in self.terms)

    def columns(self, ids: Tensor) -> Tensor:
        return torch.stack([t.columns(ids) for t in self.terms]).sum(0)


class Scaled(Matrix):
    """s · Δ with a number or a zero-dimensional tensor s."""

    def __init__(self, of: Matrix, s: float | Tensor) -> None:
        self.of, self.s, self.shape = of, s, of.shape

    def apply(self, x: Tensor) -> Tensor:
        return self.of.apply(x) * self.s

    def dense(self) -> Tensor:
        return self.of.dense() * self.s

    def row_dot(self, W: Tensor) -> Tensor:
        return self.of.row_dot(W) * self.s

    def row_squares(self) -> Tensor:
        return self.of.row_squares() * self.s**2

    def flops(self, tokens: int) -> int:
        return self.of.flops(tokens) + tokens * self.shape[0]

    def dense_flops(self) -> int:
        return self.of.dense_flops() + prod(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        return self.of.columns(ids) * self.s
