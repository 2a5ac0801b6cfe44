"""What representation fine-tuning methods share: editing a few positions of the prompt at a block's output."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.errors import OptionError, SiteError
from inlay.core.hosts import ConvHost
from inlay.core.method import HiddenMethod, option
from inlay.core.positions import Positions, tokens
from inlay.core.sites import Site


class Intervention(HiddenMethod):
    """h ← Φ(h) at the first and last positions of the prompt, at the output of the chosen blocks.

    `layers=[3, 9, 18]` of `inlay.adapt` chooses blocks. Positions count real tokens, so padding on either side changes
    nothing. Only a prompt that is read into an empty key-value cache is edited, never a token that is generated or the
    answer that training appends (see `inlay.core.positions.marked_prompts` and `prompts`).
    """

    learning_rate: ClassVar[float] = 1e-2
    where: ClassVar[tuple[str, ...]] = ("block",)

    r: int = option(default=8, doc="rank", low=1)
    positions: str = option(
        default="f7+l7", doc="first and last tokens of the prompt: 'f7+l7', 'f1', 'l3', or 'all' (padding included)"
    )
    tied: bool = option(default=True, doc="one Φ for both ends of the prompt; otherwise one for each")
    dropout: float = option(default=0.0, doc="dropout on Φ(h) − h", low=0.0, high=1.0)

    def validate(self) -> None:
        self.chosen = Positions.read(self.positions)
        if not self.tied and not (self.chosen.first and self.chosen.last):
            raise OptionError(f"{type(self).__name__}: tied=False needs both ends of the prompt, as in 'f7+l7'")

    @abstractmethod
    def build(self, site: Site) -> None:
        """Parameters with a leading axis of `self.sets` and W's of shape (sets, r, d)."""

    @abstractmethod
    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """M (sets, r, d), b (sets, r) and N (sets, r, d) of Φ(h) − h = Nᵀ(M h + b)."""

    @property
    def sets(self) -> int:
        """How many Φ there are at a site."""
        return 1 if self.tied else 2

    def count(self, site: Site) -> int:
        return self.sets * (2 * self.r * self.features(site) + self.r)

    def acts_at(self, site: Site) -> bool:
        return not site.name.startswith("decoder.")  # of two towers the encoder reads the prompt

    def features(self, site: Site) -> int:
        """Width of the hidden states; SiteError where there is no sequence of them."""
        if isinstance(site.host, ConvHost):
            raise SiteError(
                f"{self.label()} edits a sequence of hidden states, '{site.path}' gives a map: name a block"
            )
        return site.features

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.site.inlay is not None
        call, chosen = self.site.inlay.call, self.chosen
        if call.past > 0:
            return y
        if y.dim() != 3:
            raise SiteError(
                f"{self.label()} at '{self.site.path}' needs (batch, tokens, features), got {tuple(y.shape)}"
            )
        batch, length, d = y.shape
        if self.site.name.startswith(("vision.", "audio.")):  # the call's mask is that of the text
            call = type(call)()
        if chosen.everything:
            if call.prompt is None:
                return y + self.change(y, [length])
            seen, prompt = tokens(call, batch, length, y.device)
            return torch.where((seen <= prompt)[..., None], y + self.change(y, [length]), y)
        where, valid = chosen.of(call, batch, length, y.device)
        places = where[..., None].expand(-1, -1, d)
        h = y.gather(1, places)
        change = self.change(h, [h.shape[1]] if self.tied else [chosen.first, chosen.last])
        change = torch.where(valid[..., None], change, 0)  # positions in excess repeat some token: they add nothing
        return y.scatter_add(1, places, change)

    def change(self, h: Tensor, widths: list[int]) -> Tensor:
        """Φ(h) − h, in the type of h, for runs of positions that belong to one Φ each."""
        parts = [
            F.linear(F.linear(part, M, b), N.mT)
            for part, M, b, N in zip(h.split(widths, 1), *(t.to(h.dtype) for t in self.maps()), strict=True)
        ]
        return F.dropout(parts[0] if self.tied else torch.cat(parts, 1), self.dropout, self.training).to(h.dtype)
