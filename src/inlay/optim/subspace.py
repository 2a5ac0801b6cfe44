"""The low-rank subspace a gradient is projected to (GaLore): its basis, the way into it and the way back.

A gradient G (…, m, n) is seen from its shorter side: with m ≥ n the basis P (…, r, n) holds right singular vectors and
R = G Pᵀ is (…, m, r), otherwise P (…, r, m) holds left ones and R = P G is (…, r, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.core.spectrum import svd


def basis(G: Tensor, r: int) -> Tensor:
    """P, orthonormal rows: the r leading singular vectors of every matrix, one matrix after the other."""
    *stack, m, n = G.shape
    found = [svd(matrix, r)[2 if m >= n else 0].T for matrix in G.reshape(-1, m, n)]
    return torch.stack(found).reshape(*stack, r, min(m, n)).to(G.dtype)


def into(G: Tensor, P: Tensor) -> Tensor:
    """R."""
    return G @ P.mT if tall(G) else P @ G


def back(R: Tensor, P: Tensor, like: Tensor) -> Tensor:
    """R Pᵀ⁻¹ in the whole space, in the shape of `like`: R P or Pᵀ R."""
    return R @ P if tall(like) else P.mT @ R


def tall(G: Tensor) -> bool:
    return G.shape[-2] >= G.shape[-1]


def as_matrices(t: Tensor, stacked: bool) -> Tensor:
    """A tensor as (…, m, n): a stack of matrices as it is, a convolution's kernel as (c_out, c_in·k…)."""
    return t if stacked or t.dim() == 2 else t.flatten(1)


def state_numbers(shape: torch.Size, stacked: bool, r: int) -> int:
    """Numbers kept for one tensor: two moments and the basis, 2 r·max(m, n) + r·min(m, n) per matrix."""
    *stack, m, n = shape if stacked or len(shape) == 2 else (shape[0], shape[1:].numel())
    return torch.Size(stack).numel() * r * (2 * max(m, n) + min(m, n))
