from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.errors import SiteError
from inlay.core.hosts import ConvHost
from inlay.core.method import Method, WeightMethod, option, register
from inlay.core.sites import Site
from inlay.core.statistics import Calibrated, ChannelNorms


@register
class SCT(Calibrated, WeightMethod):
    """y_S ← y_S + W y_S + b on the K salient channels S of an output y; the other channels stay as they are.

    Salient are the channels of largest norm: for each class the L2 norm over all its samples and tokens, averaged over
    the classes. `inlay.calibrate` finds them from batches with class labels, the CLS token included; without labels all
    samples are one class. Not calibrated, S is random. Each place has a set of its own. This is the paper's form after
    the MLP, before the residual sum; `.on("attn.q", "attn.v")` is the one on queries and values. Both merge: the rows S
    of the base's matrix become (I + W) times themselves. Its third form, on the residual stream after attention, is not
    offered: no module of the base gives that stream out. b is trained where the base has a bias to take it. By default
    W and b start at zero, which is the base itself; `init="paper"` draws W from N(0, 0.02²), cut at 2.
    """

    kind: ClassVar[str] = "hidden"
    paper: ClassVar[str] = "Zhao et al. 2023, arXiv 2309.08513"
    where: ClassVar[tuple[str, ...]] = ("mlp.down",)
    learning_rate: ClassVar[float] = 3e-4

    channels: int = option(default=96, doc="K, channels that are tuned; all where there are fewer", low=1)
    init: Literal["base", "paper"] = option(default="base", doc="base: W = 0; paper: W normal, deviation 0.02")

    def plant(self, site: Site) -> None:
        if site.groups > 1:
            raise SiteError(f"{self.label()} would mix the outputs of different groups of '{site.path}'")
        K = self.tuned(site)
        W = torch.zeros(K, K)
        if self.init == "paper":
            nn.init.trunc_normal_(W, std=0.02)
        self.W = nn.Parameter(W.to(site.dtype))
        self.b = nn.Parameter(torch.zeros(K, dtype=site.dtype)) if site.bias is not None else None
        self.register_buffer("S", torch.randperm(site.d_out)[:K].sort().values)

    def tuned(self, site: Site) -> int:
        """K here."""
        return min(self.channels, site.d_out)

    def count(self, site: Site) -> int:
        K = self.tuned(site)
        return K * K + (K if site.bias is not None else 0)

    @property
    def starts_at_base(self) -> bool:
        return self.init == "base"

    # ------------------------------------------------------------------ the map
    def after(self, x: Tensor, y: Tensor) -> Tensor:
        host = self.site.host
        axis = y.dim() - 1 - (host.axes if isinstance(host, ConvHost) else 0)
        S = self.get_buffer("S")
        b = None if self.b is None else self.b.to(y.dtype)
        change = nn.functional.linear(y.index_select(axis, S).movedim(axis, -1), self.W.to(y.dtype), b)
        return y.index_add(axis, S, change.movedim(-1, axis))

    def weight(self, W: Tensor) -> Tensor:
        S = self.get_buffer("S")
        return W.index_add(0, S, self.W.to(W.dtype) @ W[S])

    def bias_of(self, b: Tensor | None) -> Tensor | None:
        if b is None or self.b is None:
            return b
        S = self.get_buffer("S")
        return b.index_add(0, S, self.W.to(b.dtype) @ b[S] + self.b.to(b.dtype))

    # ------------------------------------------------------------------ calibration
    def statistic(self) -> ChannelNorms:
        return ChannelNorms()

    def calibrated(self, found: Mapping[Method, Any]) -> dict[str, Tensor]:
        return {"S": found[self].norms.topk(self.tuned(self.site)).indices.sort().values}
