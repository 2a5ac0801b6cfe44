from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from inlay.core.contexts import ContextMethod
from inlay.core.method import option, register
from inlay.core.sites import Site


@register
class CoCoOp(ContextMethod):
    """v_m(x) = v_m + π(x), π(x) = W₂ relu(W₁ f(x) + b₁) + b₂: CoOp's context moved by the image x, all vectors alike.

    f(x) (e) is the image's vector at length 1, W₁ (e/16, e), W₂ (d, e/16). Every image has class prompts of its own,
    so the text tower reads images × classes of them; `chunk` bounds how many at once (all but the first of these parts
    are computed again in the backward pass), and memory stays that of one part.
    """

    paper: ClassVar[str] = "Zhou, Yang, Loy & Liu 2022, arXiv 2203.05557"
    learning_rate: ClassVar[float] = 1e-2
    conditional: ClassVar[bool] = True

    reduction: int = option(default=16, doc="e over the width of the meta-net's hidden layer", low=1)
    chunk: int = option(default=0, doc="class prompts that the text tower reads at once; 0: all", low=0)

    @property
    def starts_at_base(self) -> bool:
        return False  # the meta-net moves every context from the first step

    def build(self, site: Site) -> None:
        e, m = self.widths(site)
        self.v = nn.Parameter(self.start(site))
        inner, outer = nn.Linear(e, m, dtype=site.dtype), nn.Linear(m, site.features, dtype=site.dtype)
        self.meta = nn.Sequential(inner, nn.ReLU(), outer)

    def widths(self, site: Site) -> tuple[int, int]:
        """e, and the width of the hidden layer."""
        assert site.tower is not None
        assert site.tower.joint is not None
        e = site.tower.joint.width
        return e, max(1, e // self.reduction)

    def count(self, site: Site) -> int:
        """M·d + (e + 1)·m + (m + 1)·d, m = e/16."""
        e, m = self.widths(site)
        return self.tokens * site.features + (e + 1) * m + (m + 1) * site.features

    def at_once(self) -> int:
        return self.chunk

    def context(self, images: Tensor | None) -> Tensor:
        assert images is not None
        return (self.v + self.meta(images.to(self.v.dtype))[:, None])[:, None]
