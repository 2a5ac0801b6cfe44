"""What residual adapters share: a 1×1 convolution at every convolution with a kernel, and the network's BatchNorms."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from inlay.core.method import Placement, WeightMethod, option
from inlay.core.sites import Site
from inlay.methods.weight.normtuning import NormTuning


class ResidualAdapter(WeightMethod):
    """A trained 1×1 convolution A in or beside a frozen convolution; with groups where that has groups.

    BatchNorm is explicit. By default the network's own layers stay as they are, statistics included, in training as in
    evaluation, and no tensor of them is copied. `norms="affine"` trains copies of their γ and β, `norms="domain"` gives
    the adapter γ, β and running statistics of its own, which follow its data: the paper's BatchNorms, one set for each
    domain. Both are `NormTuning` beside the adapter; to give places with `where`, list it: `[ResidualParallel(),
    NormTuning(statistics="adapted")]`.
    """

    kind: ClassVar[str] = "hidden"
    where: ClassVar[tuple[str, ...]] = ("conv",)
    learning_rate: ClassVar[float] = 1e-3

    norms: Literal["base", "affine", "domain"] = option(
        default="base", doc="the network's BatchNorms: as they are; γ and β trained; statistics of its own as well"
    )
    pointwise: bool = option(
        default=False, doc="act at 1×1 convolutions and linear layers too, where A is as large as W"
    )
    init: Literal["base", "paper"] = option(default="base", doc="base: A = 0; paper: A normal, variance 2/d_out")

    def beside(self) -> tuple[Placement, ...]:
        if self.norms == "base":
            return ()
        return (NormTuning(statistics="frozen" if self.norms == "affine" else "adapted").on(""),)

    def acts_at(self, site: Site) -> bool:
        return self.pointwise or site.kernel_area > 1

    @property
    def starts_at_base(self) -> bool:
        return self.init == "base"

    def drawn(self, site: Site, columns: int) -> nn.Parameter:
        """A (d_out, columns) at the start."""
        A = torch.zeros(site.d_out, columns)
        return nn.Parameter((A.normal_(std=(2 / site.d_out) ** 0.5) if self.init == "paper" else A).to(site.dtype))


def centre(site: Site) -> int:
    """The number of the tap in the middle of a site's kernel; of two the first."""
    if site.kernel_area == 1:
        return 0
    tap = 0
    for k in site.parameter.shape[2:]:
        tap = tap * k + (k - 1) // 2
    return tap
