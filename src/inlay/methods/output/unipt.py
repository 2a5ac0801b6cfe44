from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.errors import SiteError
from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.core.trunks import SideMethod
from inlay.methods.output.sidenetwork import linear, normed, typed

TINY = 1e-8


@register
class UniPT(SideMethod):
    """y ← y + W_up relu(a + LN(P Σ_i c_i g_i)),  t_i = LN(W_i h_i), a = LN(W y),  g_i = (‖relu(a t_iᵀ)‖₁ + I) t_i.

    Parallel layers of width d/D read the hidden states h_i that enter the blocks of a frozen encoder, and its output y.
    Each t_i is gathered for the tokens of the anchor a by similarities that sum to one in each row, and the layers are
    weighed by confidences c = softmax_i(wᵀ(mean a ⊙ mean t_i)), a softmax that no bias would move. The trunk runs
    without a graph; what training keeps is one state per block. W_up starts at zero, which is the base;
    `residual=False` is the paper's form, whose output replaces the encoder's and starts at random.
    """

    paper: ClassVar[str] = "Diao et al. 2023, arXiv 2308.14316"
    reads_blocks: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3

    factor: int = option(default=4, doc="D: parallel layers have d/D features", low=1)
    residual: bool = option(default=True, doc="add to the encoder's output rather than replace it")

    @property
    def starts_at_base(self) -> bool:
        return self.residual

    def width(self, site: Site) -> int:
        """Features of the parallel layers."""
        return max(1, site.features // self.factor)

    def build(self, site: Site) -> None:
        trunk = self.trunk
        if trunk.of_maps:
            raise SiteError(f"{self.label()} compares the tokens of a sequence, '{site.path}' gives a map")
        if trunk.causal:
            raise SiteError(
                f"{self.label()} is for encoders: it mixes all tokens of a sequence, and '{site.path}' ends a decoder"
            )
        d, r = site.features, self.width(site)
        self.downs = nn.ModuleList(nn.Linear(d, r) for _ in range(len(site.parts) + 1))
        self.norms = nn.ModuleList(nn.LayerNorm(r) for _ in range(len(site.parts) + 1))
        self.gate = nn.Linear(r, 1, bias=False) if len(site.parts) > 1 else None
        self.projection, self.settled = nn.Linear(r, r), nn.LayerNorm(r)
        self.up = nn.Linear(r, d)
        if self.residual:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        typed(self, site.dtype)

    def count(self, site: Site) -> int:
        d, r = site.features, self.width(site)
        return (len(site.parts) + 1) * (d * r + 3 * r) + r * (len(site.parts) > 1) + (r * r + 3 * r) + (r * d + d)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        mask = self.mask(y)
        *targets, anchor = (self.parallel(i, h) for i, h in enumerate([*self.entering(), y]))
        merged = self.weighed(anchor, targets, mask)
        out = linear(self.up, F.relu(anchor + normed(self.settled, linear(self.projection, merged))))
        return y + out if self.residual else out

    def parallel(self, i: int, h: Tensor) -> Tensor:
        """t_i, or a for the last: (batch, tokens, d/D)."""
        down, norm = self.downs[i], self.norms[i]
        assert isinstance(down, nn.Linear)
        assert isinstance(norm, nn.LayerNorm)
        return normed(norm, linear(down, h))

    def weighed(self, a: Tensor, targets: list[Tensor], mask: Tensor | None) -> Tensor:
        """Σ_i c_i g_i."""
        gathered = torch.stack([self.gathered(a, t, mask) for t in targets], 1)
        if self.gate is None:
            return gathered[:, 0]
        middle = mean(a, mask)
        c = torch.cat([linear(self.gate, middle * mean(t, mask)) for t in targets], 1).softmax(1)
        return (c[:, :, None, None] * gathered).sum(1)

    def gathered(self, a: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        """g: what a's tokens find in t, and t itself; padding is not found."""
        found = t if mask is None else t * mask.to(t.dtype)[..., None]
        alike = F.relu(a @ found.mT)
        # rows are divided after the product, so that training keeps one matrix of similarities per block
        return alike @ found / alike.sum(-1, keepdim=True).clamp_min(TINY) + t


def mean(t: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over real tokens, (batch, features)."""
    if mask is None:
        return t.mean(1)
    weight = mask.to(t.dtype)[..., None]
    return (t * weight).sum(1) / weight.sum(1).clamp_min(1)
