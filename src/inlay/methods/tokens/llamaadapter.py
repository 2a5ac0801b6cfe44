from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.method import SideAttentionMethod, option, register
from inlay.core.sites import Site
from inlay.core.towers import spots_of


@register
class LLaMAAdapter(SideAttentionMethod):
    """O′ = O + tanh(g)·softmax(Q K_Aᵀ/√d_h) V_A, K_A = A W_k, V_A = A W_v, in the top L attentions of a decoder.

    Adaption prompts with zero-initialised attention. A (L, p, d) is trained, W_k and W_v are the base's own, as it is
    without adapters, and keys of prompts have no rotary positions. The softmax over the prompts is one apart from that
    over the tokens, and its gate g (L, heads) begins at zero: the adapted model begins as the base. The prompts are in
    no cache, mask or position. PEFT has another gate, one number per layer without tanh: `gate="plain"`.
    """

    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2303.16199"
    where: ClassVar[tuple[str, ...]] = ("attn",)
    learning_rate: ClassVar[float] = 3e-3

    gate: Literal["tanh", "plain"] = option(
        default="tanh", doc="tanh(g) with g per head, or as PEFT has it g itself, one number per layer"
    )

    def build(self, site: Site) -> None:
        self.spots = spots_of(site)
        shape = len(self.spots), self.tokens, site.features
        self.A = nn.Parameter(torch.randn(shape, dtype=site.dtype))
        self.g = nn.Parameter(torch.zeros(len(self.spots), self.gates(site), dtype=site.dtype))

    def gates(self, site: Site) -> int:
        """Gates of a layer."""
        return spots_of(site)[0].queries if self.gate == "tanh" else 1

    def count(self, site: Site) -> int:
        """L·(p·d + heads), or L·(p·d + 1) with plain gates."""
        return len(site.parts) * (self.tokens * site.features + self.gates(site))

    def aside(self, i: int, q: Tensor, scale: float | None) -> Tensor:
        assert self.site.inlay is not None
        with self.site.inlay.only():  # the base's own projections, where they are quantised too
            K, V = self.spots[i].keys_and_values(self.A[i].to(q.dtype))
        K, V = (t.repeat_interleave(q.shape[1] // len(t), 0).expand(len(q), -1, -1, -1) for t in (K, V))
        g = torch.tanh(self.g[i]) if self.gate == "tanh" else self.g[i]
        return g.to(q.dtype)[:, None, None] * F.scaled_dot_product_attention(q, K, V, scale=scale)
