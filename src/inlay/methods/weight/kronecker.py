"""What methods with a Kronecker product share: how widths are split, and the factors of A ⊗ B."""

from __future__ import annotations

from math import isqrt

import torch
from torch import nn

from inlay.core.errors import SiteError
from inlay.core.method import Method
from inlay.core.sites import Site


def divisors(d: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m·n = d and m ≤ n: m or n is `factor` where that divides d, else m is the largest divisor ≤ factor.

    Without a factor (-1) m is as near √d as a divisor can be: 4096 → (64, 64), 11008 → (86, 128), 768 → (24, 32).
    """
    if factor > 0 and d % factor == 0:
        return min(factor, d // factor), max(factor, d // factor)
    limit = isqrt(d) if factor < 1 else min(factor, isqrt(d))
    m = next(m for m in range(limit, 0, -1) if d % m == 0)
    return m, d // m


def pair(method: Method, site: Site, d_out: int, d_in: int, a1: int, a2: int) -> tuple[nn.Parameter, nn.Parameter]:
    """The trained A, normal, and B, zero, of A ⊗ B (d_out, d_in)."""
    a1, a2 = split(method, d_out, d_in, a1, a2)
    A = torch.empty(a1, a2).normal_(std=a2**-0.5)
    return nn.Parameter(A.to(site.dtype)), nn.Parameter(torch.zeros(d_out // a1, d_in // a2, dtype=site.dtype))


def pair_size(method: Method, d_out: int, d_in: int, a1: int, a2: int) -> int:
    """How many numbers they hold."""
    a1, a2 = split(method, d_out, d_in, a1, a2)
    return a1 * a2 + (d_out // a1) * (d_in // a2)


def split(method: Method, d_out: int, d_in: int, a1: int, a2: int) -> tuple[int, int]:
    """a₁ and a₂; SiteError where they do not divide the widths."""
    a1, a2 = a1 or divisors(d_out)[1], a2 or divisors(d_in)[0]
    for name, a, d in (("rows", a1, d_out), ("columns", a2, d_in)):
        if d % a:
            raise SiteError(f"{method.label()}: {name}={a} does not divide the width {d}: take a divisor, or 0")
    return a1, a2
