from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.attention import recorded
from inlay.core.errors import OptionError, SiteError
from inlay.core.method import PrefixMethod, option, register
from inlay.core.modes import evaluating
from inlay.core.sites import Site
from inlay.core.towers import Spot
from inlay.methods.tokens.words import check_words, ids_of, word_ids


@register
class PrefixTuning(PrefixMethod):
    """K′ = [P_k; K], V′ = [P_v; V] in every attention, with p trained keys and values per key-value head.

    P_k and P_v (L, heads, p, head size) for the L attentions of a tower. With `reparameterize` they come out of one MLP
    over E (p, d) while training, P = W₂ tanh(W₁ E + b₁) + b₂, and the MLP is folded away when the adapter is saved. The
    cache never holds the prefix and the positions of tokens do not move (`shift` counts it, as PEFT does).
    """

    paper: ClassVar[str] = "Li & Liang 2021, arXiv 2101.00190"
    where: ClassVar[tuple[str, ...]] = ("attn",)
    learning_rate: ClassVar[float] = 3e-2

    init: Literal["normal", "zero", "vocabulary", "text"] = option(
        default="normal", doc="start at noise, at zero, or at the keys and values of random words or of a text"
    )
    scale: float = option(default=0.02, doc="deviation of the normal start", low=0.0)
    text: str = option(default="", doc="the text that text_ids were made from, for the record")
    text_ids: list[int] = option(default=[], doc="token ids of the text, repeated or cut to p")
    reparameterize: bool = option(default=False, doc="train P through an MLP, which is folded away when saved")
    hidden: int = option(default=512, doc="width m of that MLP", low=1)

    def validate(self) -> None:
        check_words(type(self).__name__, self.init, self.text, self.text_ids)
        if self.reparameterize and self.init in ("vocabulary", "text"):
            raise OptionError(
                "PrefixTuning: words give keys and values, not an MLP: reparameterize=False, or init='normal'"
            )

    def with_text(self, text: str, tokenizer: Any) -> Self:
        """The same method, started at the keys and values of a text's tokens (a transformers tokenizer makes them)."""
        return self.replace(init="text", text=text, text_ids=ids_of(text, tokenizer))

    # ------------------------------------------------------------------ parameters
    def build(self, site: Site) -> None:
        spots = spots_of(site)
        L, heads, size = len(spots), spots[0].heads, spots[0].size
        self.shape = heads, size
        if self.reparameterize:
            self.E = nn.Parameter(torch.randn(self.tokens, site.features, dtype=site.dtype))
            inner = nn.Linear(site.features, self.hidden, dtype=site.dtype)
            outer = nn.Linear(self.hidden, 2 * L * heads * size, dtype=site.dtype)
            if self.init == "zero":
                nn.init.zeros_(outer.weight)
                nn.init.zeros_(outer.bias)
            self.mlp = nn.ModuleList([inner, outer])
            return
        if self.init in ("vocabulary", "text"):
            P_k, P_v = self.read(site, spots)
        else:
            P_k, P_v = (torch.randn(L, heads, self.tokens, size) * self.scale for _ in range(2))
        if self.init == "zero":
            P_k, P_v = torch.zeros_like(P_k), torch.zeros_like(P_v)
        self.hold(P_k.to(site.dtype), P_v.to(site.dtype))

    def hold(self, P_k: Tensor, P_v: Tensor) -> None:
        self.P_k, self.P_v = nn.Parameter(P_k), nn.Parameter(P_v)

    @torch.no_grad()
    def read(self, site: Site, spots: list[Spot]) -> tuple[Tensor, Tensor]:
        """The keys and values of words, as the base makes them."""
        tower = site.tower
        assert tower is not None
        assert site.inlay is not None
        if tower.embedding is None or any(spot.is_cross for spot in spots):
            raise SiteError(f"{self.label()}: only self-attention over token ids can begin with words")
        ids = word_ids(self.init, self.text_ids, self.tokens, tower.embedding.num_embeddings)
        with evaluating(tower.module), site.inlay.only(), recorded(spots) as recorders:
            tower.module(input_ids=torch.tensor([ids], device=tower.embedding.weight.device))
        found = [recorder.found for recorder in recorders if recorder.found is not None]
        keys, values = zip(*found, strict=True)
        return torch.stack(keys), torch.stack(values)

    def count(self, site: Site) -> int:
        """2·L·d_kv·p, or while reparameterised p·d + (d + 1)·m + (m + 1)·2·L·d_kv."""
        L, spot, m = len(site.parts), spots_of(site)[0], self.hidden
        width = 2 * L * spot.heads * spot.size
        return (
            self.tokens * site.features + (site.features + 1) * m + (m + 1) * width
            if self.reparameterize
            else (self.kept(site))
        )

    def kept(self, site: Site) -> int:
        """Parameters of the saved adapter, 2·L·d_kv·p."""
        spot = spots_of(site)[0]
        return 2 * len(site.parts) * spot.heads * spot.size * self.tokens

    # ------------------------------------------------------------------ what the attentions see
    def prefix(self, i: int) -> tuple[Tensor, Tensor]:
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
        keys, values = zip(*(self.prefix(i) for i in range(len(self.site.parts))), strict=True)
        return {"P_k": torch.stack(keys), "P_v": torch.stack(values)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if "mlp" in self._modules:
            device = self.E.device
            del self.E, self.mlp
            self.hold(*(tensors[name].to(device, self.site.dtype) for name in ("P_k", "P_v")))
        super().restore(tensors)


def spots_of(site: Site) -> list[Spot]:
    """The attentions of a prefix's site."""
    assert site.tower is not None
    return site.tower.at(site.parts)
