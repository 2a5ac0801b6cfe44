from __future__ import annotations

from typing import ClassVar

from inlay.core.method import register
from inlay.methods.hidden.bottleneck import Series


@register
class LinAdapter(Series):
    """h ← h + W_up σ(W_down LN(h) + b_down) + b_up, at the end of every block, with a LayerNorm of its own."""

    paper: ClassVar[str] = "Lin, Madotto & Fung 2020, arXiv 2004.03829"
    where: ClassVar[tuple[str, ...]] = ("block",)
    normed: ClassVar[bool] = True
