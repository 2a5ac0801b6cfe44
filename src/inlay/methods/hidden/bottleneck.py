"""What bottleneck adapters share: two small matrices with a non-linearity between, and AdapterDrop.

`Bottleneck` leaves open what the matrices are made of and where f acts. `Dense` has them as they are; `Series` lets f
act on a module's output, `Parallel` on its input.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.draws import Draw
from inlay.core.errors import OptionError, SiteError
from inlay.core.hosts import ConvHost
from inlay.core.method import HiddenMethod, Method, option, uniform
from inlay.core.sites import Site

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from inlay.core.adapter import Adapter

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu", "identity"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "identity": lambda h: h,
}


class Bottleneck(HiddenMethod):
    """f(h) = s (W_up σ(W_down h + b_down) + b_up), with r ≪ d.

    AdapterDrop (Rücklé et al. 2020, arXiv 2010.11918): `drop=n` leaves out the lowest n blocks, which then need no
    backward pass. With `robust` every block is built, and each optimizer step draws how many of the lowest are left out
    in training, so that one adapter serves with any n: `drop` says with which, `leave_out` changes it afterwards. Under
    `torch.compile` each n is compiled apart.
    """

    r: int = option(default=64, doc="bottleneck width", low=1)
    activation: Activation = option(default="relu", doc="non-linearity σ")
    bias: bool = option(default=True, doc="train b_down and b_up; otherwise there are none")
    scale: float = option(default=1.0, doc="factor s on what the adapter adds")
    learned: bool = option(default=False, doc="train s, from `scale`")
    dropout: float = option(default=0.0, doc="dropout on what the adapter adds", low=0.0, high=1.0)
    drop: int = option(default=0, doc="AdapterDrop: leave out the lowest blocks, this many", low=0)
    robust: bool = option(default=False, doc="AdapterDrop: leave out a random number of low blocks in training")

    learning_rate: ClassVar[float] = 3e-3
    reads_input: ClassVar[bool] = False
    """Whether f acts on the module's input x rather than on its output y."""
    normed: ClassVar[bool] = False
    """Whether a LayerNorm of its own comes before W_down."""

    @abstractmethod
    def adapted(self, x: Tensor, y: Tensor) -> Tensor:
        """The module's new output from its input x and its output y."""

    @abstractmethod
    def plant(self, site: Site, d_in: int, d_out: int) -> None:
        """Create what the two matrices are made of."""

    @abstractmethod
    def size(self, site: Site, d_in: int, d_out: int) -> int:
        """How many trained numbers that are."""

    @abstractmethod
    def matrices(self) -> tuple[Tensor, Tensor]:
        """W_down (r, d_in) and W_up (d_out, r)."""

    # ------------------------------------------------------------------ places and parameters
    def acts_at(self, site: Site) -> bool:
        if (self.drop or self.robust) and site.depth is None:
            raise SiteError(f"{self.label()}: '{site.path}' is in no block, so AdapterDrop cannot count blocks there")
        return self.robust or not self.drop or (site.depth or 0) >= self.drop

    def build(self, site: Site) -> None:
        d_in, d_out = self.widths(site)
        self.plant(site, d_in, d_out)
        self.down_bias = trained(torch.zeros(self.r), site) if self.bias else None
        self.up_bias = trained(torch.zeros(d_out), site) if self.bias else None
        self.gain = trained(torch.ones(d_in), site) if self.normed else None
        self.shift = trained(torch.zeros(d_in), site) if self.normed else None
        self.s = trained(torch.tensor(self.scale), site) if self.learned else None
        self.depth = Draw() if self.robust else None
        self.blocks = 1 + max((peer.depth or 0 for peer in site.peers if tower(peer) == tower(site)), default=0)

    def count(self, site: Site) -> int:
        d_in, d_out = self.widths(site)
        biases = self.r + d_out if self.bias else 0
        return self.size(site, d_in, d_out) + biases + (2 * d_in if self.normed else 0) + self.learned

    def widths(self, site: Site) -> tuple[int, int]:
        """(features f reads, features f writes); SiteError where the module has no such features."""
        return ends(self, site) if self.reads_input else (site.features, site.features)

    # ------------------------------------------------------------------ the forward
    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.adapted(x, y) if self.keeps() else y

    def f(self, h: Tensor) -> Tensor:
        """s (W_up σ(W_down h + b_down) + b_up) along the features of h, in the type of h."""
        channels = isinstance(self.site.host, ConvHost)
        if channels:
            h = h.movedim(1, -1)
        if self.gain is not None and self.shift is not None:
            h = F.layer_norm(h, self.gain.shape, self.gain.to(h.dtype), self.shift.to(h.dtype))
        down, up = (W.to(h.dtype) for W in self.matrices())
        b_down, b_up = (b if b is None else b.to(h.dtype) for b in (self.down_bias, self.up_bias))
        out = F.linear(ACTIVATIONS[self.activation](F.linear(h, down, b_down)), up, b_up)
        if self.s is not None or self.scale != 1.0:
            out = out * (self.scale if self.s is None else self.s.to(h.dtype))
        out = F.dropout(out, self.dropout, self.training)
        return out.movedim(-1, 1) if channels else out

    def keeps(self) -> bool:
        """Whether this block's adapter acts now (AdapterDrop)."""
        lowest = self.depth.of(self.blocks) if self.depth is not None and self.training else self.drop
        return (self.site.depth or 0) >= lowest

    def step(self, progress: float, optimizer: Optimizer | None) -> None:
        if self.depth is not None:
            self.depth.next()


class Dense(Bottleneck):
    """W_down and W_up are matrices of their own."""

    init: Literal["zero", "near", "bert"] = option(
        default="zero",
        doc="W_up zero and W_down as nn.Linear: exactly the base at start; near: both N(0, 0.01²) cut at 2σ; "
        "bert: both N(0, 0.02²)",
    )

    def plant(self, site: Site, d_in: int, d_out: int) -> None:
        down, up = torch.empty(self.r, d_in), torch.zeros(d_out, self.r)
        if self.init == "zero":
            down = uniform((self.r, d_in), d_in**-0.5)
        elif self.init == "near":
            for w in (down, up):
                nn.init.trunc_normal_(w, std=0.01, a=-0.02, b=0.02)
        else:
            for w in (down, up):
                w.normal_(std=0.02)
        self.down, self.up = trained(down, site), trained(up, site)

    def size(self, site: Site, d_in: int, d_out: int) -> int:
        return self.r * (d_in + d_out)

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up

    @property
    def starts_at_base(self) -> bool:
        return self.init == "zero"


class Series(Dense):
    """y ← y + f(y): after a module."""

    def adapted(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.f(y)


class Parallel(Dense):
    """y ← y + f(x): beside a module."""

    reads_input: ClassVar[bool] = True

    def adapted(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.f(x)


def leave_out(adapter: Adapter, n: int) -> None:
    """AdapterDrop at inference: let the bottlenecks in the lowest n blocks of an attached adapter rest; 0 wakes all."""
    bottlenecks = [level.method for level in adapter.levels if isinstance(level.method, Bottleneck)]
    if not bottlenecks:
        raise OptionError(f"adapter '{adapter.name}' has no bottleneck whose block could be left out")
    for method in bottlenecks:
        if method.site.depth is None:
            raise SiteError(f"'{method.site.path}' is in no block, so AdapterDrop cannot count blocks there")
        method.drop = n


def ends(method: Method, site: Site) -> tuple[int, int]:
    """Widths of the input and the output of a site; SiteError where the input is not a vector."""
    channels = isinstance(site.host, ConvHost)
    if site.is_embedding or channels:
        raise SiteError(
            f"{method.label()} needs vectors at '{site.path}', which reads {'a map' if channels else 'ids'}"
        )
    whole = site.host is None or site.entry is not None
    return (site.features if whole else site.d_in), site.features


def trained(t: Tensor, site: Site) -> nn.Parameter:
    return nn.Parameter(t.to(site.dtype))


def tower(site: Site) -> str:
    """The tower whose blocks `site.depth` counts: encoder and decoder, vision and text."""
    return site.name.partition("block[")[0]
