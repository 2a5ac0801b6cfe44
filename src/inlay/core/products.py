"""Structured updates that are products of smaller matrices: Kronecker, Hadamard, Khatri-Rao, one tap, and U M Vᵀ.

The contract is that of `inlay.core.matrices`.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.matrices import Dense, LowRank, Matrix


class Kronecker(Matrix):
    """Δ = P ⊗ Q with P (p, q) and Q (m, n), which may have a structure of its own; Δ is (p·m, q·n)."""

    def __init__(self, P: Tensor, Q: Tensor | Matrix) -> None:
        self.P, self.Q = P, Dense(Q) if isinstance(Q, Tensor) else Q
        self.shape = (P.shape[0] * self.Q.shape[0], P.shape[1] * self.Q.shape[1])

    def apply(self, x: Tensor) -> Tensor:
        X = self.Q.apply(x.unflatten(-1, (self.P.shape[1], self.Q.shape[1])))  # Q first: it acts on the contiguous axis
        return torch.matmul(self.P.to(x.dtype), X).flatten(-2)  # (…, q, m) to (…, p·m)

    def dense(self) -> Tensor:
        return torch.kron(self.P, self.Q.dense())

    def row_dot(self, W: Tensor) -> Tensor:
        (p, q), (m, n) = self.P.shape, self.Q.shape
        W = W.to(self.P.dtype).reshape(p, m, q, n)
        return torch.einsum("piqn,pq,in->pi", W, self.P, self.Q.dense()).flatten()

    def row_squares(self) -> Tensor:
        return torch.outer(self.P.square().sum(1), self.Q.row_squares()).flatten()

    def flops(self, tokens: int) -> int:
        p, q = self.P.shape
        return self.Q.flops(tokens * q) + 2 * tokens * p * q * self.Q.shape[0]

    def moved(self, tokens: int) -> int:
        return 8 * tokens * max(self.shape)

    def dense_flops(self) -> int:
        return self.Q.dense_flops() + prod(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        n = self.Q.shape[1]
        P, Q = self.P.T[ids // n], self.Q.columns(ids % n)  # (…, p), (…, m)
        return (P.unsqueeze(-1) * Q.unsqueeze(-2)).flatten(-2)


class Formed(Matrix):
    """A matrix with few numbers that has no cheaper way to act than to be formed."""

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype))

    def row_dot(self, W: Tensor) -> Tensor:
        return (W * self.dense()).sum(1)

    def row_squares(self) -> Tensor:
        return self.dense().square().sum(1)

    def flops(self, tokens: int) -> int:
        return self.dense_flops() + 2 * tokens * prod(self.shape)


class Hadamard(Formed):
    """Δ = (B₁A₁) ⊙ (B₂A₂), of rank up to r₁·r₂: also the low-rank product of r₁·r₂ pairs of columns and of rows."""

    def __init__(self, left: LowRank, right: LowRank) -> None:
        if left.shape != right.shape:
            raise ValueError(f"Hadamard needs two factors of one shape, got {left.shape} and {right.shape}")
        self.left, self.right, self.shape = left, right, left.shape

    def apply(self, x: Tensor) -> Tensor:
        spread = self.spread_flops(x.numel() // self.shape[1]) < super().flops(x.numel() // self.shape[1])
        return self.spread().apply(x) if spread else super().apply(x)

    def spread(self) -> LowRank:
        """Δ = B A: columns of B are products of one of B₁ and one of B₂, rows of A of one of A₁ and one of A₂."""
        B = (self.left.B.unsqueeze(2) * self.right.B.unsqueeze(1)).flatten(1)
        A = (self.left.A.unsqueeze(1) * self.right.A.unsqueeze(0)).flatten(0, 1)
        return LowRank(B, A, self.left.scale * self.right.scale)

    def spread_flops(self, tokens: int) -> int:
        return (2 * tokens + 1) * self.left.rank * self.right.rank * sum(self.shape)

    def flops(self, tokens: int) -> int:
        return min(super().flops(tokens), self.spread_flops(tokens))

    def dense(self) -> Tensor:
        return self.left.dense() * self.right.dense()

    def dense_flops(self) -> int:
        return self.left.dense_flops() + self.right.dense_flops() + prod(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        return self.left.columns(ids) * self.right.columns(ids)


class KhatriRao(Formed):
    """Δ_i = V_i ⊗ U_i, row by row, cut to `width` numbers, with U (m, p) and V (m, q); or the transpose of that."""

    def __init__(self, U: Tensor, V: Tensor, width: int, transposed: bool = False) -> None:
        self.U, self.V, self.width, self.transposed = U, V, width, transposed
        self.shape = (width, U.shape[0]) if transposed else (U.shape[0], width)

    def dense(self) -> Tensor:
        rows = (self.V.unsqueeze(-1) * self.U.unsqueeze(-2)).flatten(-2)[:, : self.width]
        return rows.T if self.transposed else rows

    def dense_flops(self) -> int:
        return prod(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        if self.transposed:
            return (self.V[ids].unsqueeze(-1) * self.U[ids].unsqueeze(-2)).flatten(-2)[..., : self.width]
        p = self.U.shape[1]
        return self.V.T[ids // p] * self.U.T[ids % p]


class Tap(Matrix):
    """Δ = A ⊗ e_tᵀ, a 1×1 convolution A (d_out, q) at the t-th of `taps` taps of a kernel; (d_out, q·taps)."""

    def __init__(self, A: Tensor, tap: int, taps: int) -> None:
        self.A, self.tap, self.taps = A, tap, taps
        self.shape = (A.shape[0], A.shape[1] * taps)

    def seen(self, x: Tensor) -> Tensor:
        """What lies under the tap (…, q)."""
        return x[..., self.tap :: self.taps]

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(self.seen(x), self.A.to(x.dtype))

    def dense(self) -> Tensor:
        return F.pad(self.A.unsqueeze(-1), (self.tap, self.taps - 1 - self.tap)).flatten(-2)

    def row_dot(self, W: Tensor) -> Tensor:
        return (self.seen(W) * self.A).sum(1)

    def row_squares(self) -> Tensor:
        return self.A.square().sum(1)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * prod(self.A.shape)

    def dense_flops(self) -> int:
        return 0

    def columns(self, ids: Tensor) -> Tensor:
        return F.embedding(ids // self.taps, self.A.T) * (ids % self.taps == self.tap).to(self.A.dtype).unsqueeze(-1)


class Sandwich(Matrix):
    """Δ = U M Vᵀ with U (d_out, n), V (d_in, n) and a structured M (n, n)."""

    def __init__(self, U: Tensor, M: Matrix, V: Tensor) -> None:
        self.U, self.M, self.V = U, M, V
        self.shape = (U.shape[0], V.shape[0])

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(self.M.apply(F.linear(x, self.V.T.to(x.dtype))), self.U.to(x.dtype))

    def dense(self) -> Tensor:
        return self.U @ self.M.apply(self.V).T

    def row_dot(self, W: Tensor) -> Tensor:
        return (self.M.apply(W.to(self.V.dtype) @ self.V) * self.U).sum(1)

    def row_squares(self) -> Tensor:
        MV = self.M.apply(self.V)  # V Mᵀ
        return ((self.U @ (MV.T @ MV)) * self.U).sum(1)

    @property
    def remembers_input(self) -> bool:
        return self.V.requires_grad

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.U.shape[1] * sum(self.shape) + self.M.flops(tokens)

    def dense_flops(self) -> int:
        return self.M.flops(self.shape[1]) + 2 * self.U.shape[1] * prod(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        return F.linear(self.M.apply(F.embedding(ids, self.V)), self.U)
