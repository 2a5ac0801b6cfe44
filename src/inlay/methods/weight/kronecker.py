"""How widths are split for Kronecker products."""

from __future__ import annotations

from math import isqrt


def divisors(d: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m·n = d and m ≤ n: m or n is `factor` where that divides d, else m is the largest divisor ≤ factor.

    Without a factor (-1) m is as near √d as a divisor can be: 4096 → (64, 64), 11008 → (86, 128), 768 → (24, 32).
    """
    if factor > 0 and d % factor == 0:
        return min(factor, d // factor), max(factor, d // factor)
    limit = isqrt(d) if factor < 1 else min(factor, isqrt(d))
    m = next(m for m in range(limit, 0, -1) if d % m == 0)
    return m, d // m
