"""What representation fine-tuning methods share: editing a few positions of the prompt at a block's output."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.errors import OptionError, SiteError
from inlay.core.hosts import ConvHost
from inlay.core.method import HiddenMethod, option, uniform
from inlay.core.positions import Positions, tokens
from inlay.core.sites import Site
from inlay.methods.hidden.bottleneck import ACTIVATIONS, Activation


class Maps(NamedTuple):
    """Φ(h) − h = Nᵀ(σ(W h + b) − D h); N, W and D are (sets, r, d), b is (sets, r)."""

    N: Tensor
    b: Tensor
    W: Tensor | None = None
    D: Tensor | None = None
    sigma: Activation = "identity"

    def change(self, h: Tensor, k: int, acting: Tensor | None) -> Tensor:
        """Φ(h) − h of the k-th Φ for h (batch, tokens, d); along the directions `acting` (batch, r) alone, if given."""
        N, b = self.N[k].to(h.dtype), self.b[k].to(h.dtype)
        W, D = (t if t is None else t[k].to(h.dtype) for t in (self.W, self.D))
        if self.sigma == "identity" and D is not None:  # one product, and exactly zero where W = D and b = 0
            W, D = -D if W is None else W - D, None
        z = b.expand(*h.shape[:-1], -1) if W is None else ACTIVATIONS[self.sigma](F.linear(h, W, b))
        if D is not None:
            z = z - F.linear(h, D)
        return F.linear(z if acting is None else z * acting[:, None].to(z), N.mT)


class Intervention(HiddenMethod):
    """h ← Φ(h) at the first and last positions of the prompt, at the output of the chosen blocks.

    `layers=[3, 9, 18]` of `inlay.adapt` chooses blocks. Positions count real tokens, so padding on either side changes
    nothing. Only a prompt that is read into an empty key-value cache is edited, never a token that is generated or the
    answer that training appends (see `inlay.core.positions.marked_prompts` and `prompts`). Inside
    `inlay.core.positions.directions` only some of the r directions act, row by row: several tasks can be learnt in
    directions of their own, and composed.
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
    def maps(self) -> Maps:
        """What Φ is made of now."""

    @property
    def sets(self) -> int:
        """How many Φ there are at a site."""
        return 1 if self.tied else 2

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
        maps, acting = self.maps(), self.acting()
        parts = [maps.change(part, k, acting) for k, part in enumerate(h.split(widths, 1))]
        return F.dropout(parts[0] if self.tied else torch.cat(parts, 1), self.dropout, self.training).to(h.dtype)

    def acting(self) -> Tensor | None:
        """Which of the r directions act now on each row (batch, r), see `inlay.core.positions.directions`."""
        assert self.site.inlay is not None
        chosen = self.site.inlay.call.directions
        if chosen is None:
            return None
        if chosen.shape[1] > self.r:
            raise OptionError(f"{self.label()} has directions 0 to {self.r - 1}, asked for is {chosen.shape[1] - 1}")
        return F.pad(chosen, (0, self.r - chosen.shape[1]))


class Rotated(Intervention):
    """An intervention along r orthonormal directions, the rows of R.

    The trained tensor is A (sets, r, d), and R the orthonormal factor of its LQ decomposition A = L R, so R Rᵀ = I
    holds whatever the optimizer does and A is stored and loaded like any parameter.
    """

    def turned(self, site: Site) -> Tensor:
        """Create A, at R; gives R."""
        R = orthonormal(torch.randn(self.sets, self.r, self.features(site))).to(site.dtype)
        self.A = nn.Parameter(R)
        return orthonormal(R)

    @property
    def R(self) -> Tensor:
        """(sets, r, d), orthonormal rows; made once while nothing trains."""
        return self.once("R", lambda: orthonormal(self.A))


class Biased(Rotated):
    """An intervention along orthonormal directions whose only other tensor is b (sets, r)."""

    init: Literal["zero", "paper"] = option(default="zero", doc="zero: b = 0; paper: b uniform in (0, 1), as in pyreft")

    def build(self, site: Site) -> None:
        self.turned(site)
        b = torch.rand(self.sets, self.r) if self.init == "paper" else torch.zeros(self.sets, self.r)
        self.b = nn.Parameter(b.to(site.dtype))

    def count(self, site: Site) -> int:
        """r·d + r per set."""
        return self.sets * (self.r * self.features(site) + self.r)


class Free(Intervention):
    """An intervention by two matrices W₁ and W₂ (r, d) without constraints."""

    activation: Activation = option(default="identity", doc="non-linearity σ on W₁ h + b")
    init: Literal["base", "paper"] = option(default="base", doc="base: W₂ = 0; paper: W₁, b and W₂ as nn.Linear")

    def build(self, site: Site) -> None:
        d = self.features(site)
        W1, W2 = (uniform((self.sets, self.r, d), d**-0.5) for _ in range(2))
        b = uniform((self.sets, self.r), d**-0.5)
        if self.init == "base":
            W2, b = torch.zeros_like(W2), torch.zeros_like(b)
        self.W1, self.W2, self.b = (nn.Parameter(t.to(site.dtype)) for t in (W1, W2, b))

    def count(self, site: Site) -> int:
        return self.sets * (2 * self.r * self.features(site) + self.r)

    @property
    def starts_at_base(self) -> bool:
        return self.init == "base"


def orthonormal(A: Tensor) -> Tensor:
    """R of A = L R, L lower triangular with a positive diagonal; R = A where the rows are orthonormal already."""
    Q, U = torch.linalg.qr(A.mT.to(torch.promote_types(A.dtype, torch.float32)))
    return (Q * U.diagonal(dim1=-2, dim2=-1).sgn()[..., None, :]).mT.to(A.dtype)
