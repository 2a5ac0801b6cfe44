"""Singular values and vectors of a base's matrices: deterministic, and fast where only the leading ones are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 256
"""Matrices with a side up to this are decomposed exactly and in float64: it costs milliseconds."""
OVERSAMPLING = 10
"""Directions that a randomised decomposition follows beyond those asked for."""


def svd(W: Tensor, r: int | None = None, iterations: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, r), σ (r,) descending and V (d_in, r) with W ≈ U diag(σ) Vᵀ, in float32 at least.

    All of them without `r`. The largest number of every column of U is made positive, which leaves no sign to chance.

    Args:
        r: how many of the leading ones; no more than min(d_out, d_in) are given.
        iterations: subspace iterations of the randomised decomposition (Halko, Martinsson & Tropp 2011) of matrices
            that are not small, from one fixed draw; 0 decomposes exactly.
    """
    k = min(W.shape)
    wide = torch.promote_types(W.dtype, torch.float32)
    W = W.detach().to(torch.float64 if k <= SMALL else wide)
    if r is None or not iterations or k <= SMALL or r + OVERSAMPLING >= k:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, Vh = randomised(W, r + OVERSAMPLING, iterations)
    r = k if r is None else min(r, k)
    U, S, V = U[:, :r], S[:r], Vh[:r].T
    signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return (U * signs).to(wide), S.to(wide), (V * signs).to(wide)


def randomised(W: Tensor, q: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading q triples, from an orthonormal basis of (W Wᵀ)^iterations W Ω."""
    meta = W.is_meta
    generator = None if meta else torch.Generator("cpu").manual_seed(0)
    omega = torch.empty(W.shape[1], q, device="meta" if meta else "cpu").normal_(generator=generator)
    Q = torch.linalg.qr(W @ omega.to(W)).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, Vh
