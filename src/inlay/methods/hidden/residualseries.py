from __future__ import annotations

from typing import ClassVar

from inlay.core.method import register
from inlay.core.sites import Site
from inlay.core.transform import Blocks, Plus, TransformMethod
from inlay.methods.hidden.residualadapter import ResidualAdapter


@register
class ResidualSeries(ResidualAdapter, TransformMethod):
    """y = z + A ∗ z with z = F(x), a 1×1 convolution A after each frozen convolution F that has a kernel.

    A is (c_out, c_out), and W′ = (I + A) W merges. By default A starts at zero, which is the base itself; the official
    code starts as `init="paper"` and gives every domain BatchNorms of its own, `norms="domain"`. It also normalises
    what A reads, A ∗ BN(z): left out here, where A itself takes in such a scale, and the BatchNorm after F the shift.
    """

    paper: ClassVar[str] = "Rebuffi, Bilen & Vedaldi 2017, arXiv 1705.08045"
    turns_bias: ClassVar[bool] = True

    def build(self, site: Site) -> None:
        self.A = self.drawn(site, site.d_out // site.groups)

    def count(self, site: Site) -> int:
        return site.d_out**2 // site.groups

    def left(self) -> Plus:
        return Plus(Blocks(self.A.unflatten(0, (self.site.groups, -1))))
