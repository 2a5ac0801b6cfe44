from __future__ import annotations

from typing import ClassVar

from inlay.core.method import DeltaMethod, register
from inlay.core.products import Tap
from inlay.core.sites import Site
from inlay.methods.hidden.residualadapter import ResidualAdapter, centre


@register
class ResidualParallel(ResidualAdapter, DeltaMethod):
    """y = F(x) + A ∗ x, a 1×1 convolution A beside each frozen convolution F that has a kernel.

    A ∗ x is what F would add with A in the middle of its kernel, at its stride, so merging writes A there. A is
    (c_out, c_in), 1/9 of a 3×3 kernel. By default A starts at zero, which is the base itself; the official code starts
    as `init="paper"` and gives every domain BatchNorms of its own, `norms="domain"`. Its `dropout` is on x.
    """

    paper: ClassVar[str] = "Rebuffi, Bilen & Vedaldi 2018, arXiv 1803.10082"

    def build(self, site: Site) -> None:
        self.A = self.drawn(site, site.d_in // site.kernel_area)
        self.tap, self.taps = centre(site), site.kernel_area

    def count(self, site: Site) -> int:
        return site.d_out * site.d_in // site.kernel_area

    def delta(self) -> Tap:
        return Tap(self.A, self.tap, self.taps)
