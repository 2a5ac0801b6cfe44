from __future__ import annotations

from typing import ClassVar

from inlay.core.method import Method, register
from inlay.core.sites import Site


@register
class LinearProbe(Method):
    """logits = W f(x) + b: the task head alone, on frozen features.

    Nothing is attached to the base; the head that every method trains beside itself is all there is.
    """

    kind: ClassVar[str] = "output"
    paper: ClassVar[str] = "linear probing"
    has_sites: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2

    def build(self, site: Site) -> None:
        return

    def count(self, site: Site) -> int:
        return 0
