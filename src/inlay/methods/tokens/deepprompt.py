"""What prefix tuning and P-tuning v2 share: trained keys and values before those of the tokens, at every depth."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.draws import kept
from inlay.core.method import PrefixMethod, option
from inlay.core.sites import Site
from inlay.core.towers import Spot, spots_of


class DeepPrompt(PrefixMethod):
    """K′ = [P_k; K], V′ = [P_v; V] from one table of all attentions, or while training from one MLP.

    P_k and P_v (L, heads, p, head size) for the L attentions of a tower, with one head per key-value head. With
    `reparameterize` they come out of P = W₂ tanh(W₁ E + b₁) + b₂ over E (p, d), and the MLP is folded away when the
    adapter is saved.
    """

    init: str = option(default="normal", doc="start at noise or at zero")
    scale: float = option(default=0.02, doc="deviation of the normal start", low=0.0)
    reparameterize: bool = option(default=False, doc="train P through an MLP, which is folded away when saved")
    hidden: int = option(default=512, doc="width m of that MLP", low=1)
    dropout: float = option(default=0.0, doc="dropout on P", low=0.0, high=0.99)

    @abstractmethod
    def start(self, site: Site, spots: list[Spot]) -> tuple[Tensor, Tensor]:
        """P_k and P_v to begin with, where no MLP makes them."""

    def drawn(self, spots: list[Spot]) -> tuple[Tensor, Tensor]:
        """Noise, or zeros, for `start`."""
        shape = len(spots), spots[0].heads, self.tokens, spots[0].size
        if self.init == "zero":
            return torch.zeros(shape), torch.zeros(shape)
        return torch.randn(shape) * self.scale, torch.randn(shape) * self.scale

    # ------------------------------------------------------------------ parameters
    def build(self, site: Site) -> None:
        spots = spots_of(site)
        L, heads, size = len(spots), spots[0].heads, spots[0].size
        self.shape = heads, size
        if not self.reparameterize:
            P_k, P_v = self.start(site, spots)
            self.hold(P_k.to(site.dtype), P_v.to(site.dtype))
            return
        self.E = nn.Parameter(torch.randn(self.tokens, site.features, dtype=site.dtype))
        inner = nn.Linear(site.features, self.hidden, dtype=site.dtype)
        outer = nn.Linear(self.hidden, 2 * L * heads * size, dtype=site.dtype)
        if self.init == "zero":
            nn.init.zeros_(outer.weight)
            nn.init.zeros_(outer.bias)
        self.mlp = nn.ModuleList([inner, outer])

    def hold(self, P_k: Tensor, P_v: Tensor) -> None:
        self.P_k, self.P_v = nn.Parameter(P_k), nn.Parameter(P_v)

    def count(self, site: Site) -> int:
        """2·L·d_kv·p, or while reparameterised p·d + (d + 1)·m + (m + 1)·2·L·d_kv."""
        if not self.reparameterize:
            return self.kept(site)
        d, m, width = site.features, self.hidden, self.kept(site) // self.tokens
        return self.tokens * d + (d + 1) * m + (m + 1) * width

    def kept(self, site: Site) -> int:
        """Parameters of the saved adapter, 2·L·d_kv·p."""
        spot = spots_of(site)[0]
        return 2 * len(site.parts) * spot.heads * spot.size * self.tokens

    # ------------------------------------------------------------------ what the attentions see
    def prefix(self, i: int) -> tuple[Tensor, Tensor]:
        P_k, P_v = self.once(f"prefix {i}", lambda: self.whole(i)) if "mlp" in self._modules else self.whole(i)
        return self.drop(P_k), self.drop(P_v)

    def drop(self, P: Tensor) -> Tensor:
        """P with dropout, of the same draw compiled and not."""
        rests = self.training and self.dropout > 0.0
        return P * (kept(tuple(P.shape), self.dropout, P) / (1 - self.dropout)) if rests else P

    def whole(self, i: int) -> tuple[Tensor, Tensor]:
        """P_k and P_v of one attention, before dropout."""
        if "mlp" not in self._modules:
            return self.P_k[i], self.P_v[i]
        heads, size = self.shape
        inner, outer = self.mlp
        assert isinstance(inner, nn.Linear)
        assert isinstance(outer, nn.Linear)
        rows = slice(2 * i * heads * size, 2 * (i + 1) * heads * size)  # this attention's part of the MLP alone
        P = F.linear(torch.tanh(inner(self.E)), outer.weight[rows], outer.bias[rows])
        P_k, P_v = P.view(self.tokens, 2, heads, size).permute(1, 2, 0, 3)
        return P_k, P_v

    # ------------------------------------------------------------------ files hold no MLP
    def stored(self) -> dict[str, Tensor]:
        keys, values = zip(*(self.whole(i) for i in range(len(self.site.parts))), strict=True)
        return {"P_k": torch.stack(keys), "P_v": torch.stack(values)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if "mlp" in self._modules:
            device = self.E.device
            del self.E, self.mlp
            self.hold(*(tensors[name].to(device, self.site.dtype) for name in ("P_k", "P_v")))
        super().restore(tensors)
