"""Sites: the places in a network a method can sit at, and what each kind of place knows about its tensor.

Every matrix site speaks one language, a matrix W of shape (d_out, d_in) acting on row batches, whatever the module
stores: a convolution's kernel is flattened to (c_out, c_in/groups · k…), an embedding table (V, d) is its transpose
(d, V) acting on one-hot ids, a packed query-key-value matrix is one block of rows. A `Host` translates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inlay.core.errors import SiteError
from inlay.core.hosts import ConvHost, EmbeddingHost, Host, QuantisedHost
from inlay.core.matrices import Matrix
from inlay.core.quantised import dense, is_quantised, shape
from inlay.core.rows import Rows

if TYPE_CHECKING:
    from inlay.core.container import Inlay
    from inlay.core.towers import Tower
    from inlay.core.trunks import Trunk


@dataclass(frozen=True)
class Source:
    """A place whose output a method at another site hears: a module, and which rows of its output."""

    path: str
    module: nn.Module
    rows: Rows | None = None


@dataclass(eq=False)
class Site:
    """One place: a module, which of its tensors, and what a method may ask about it."""

    path: str
    """Module path in the base model; for spans the module whose output is the site's output."""
    module: nn.Module
    name: str = ""
    """Neutral name (`block[3].attn.q`), or the path where the anatomy has none."""
    depth: int | None = None
    host: Host | None = None
    param: str = "weight"
    rows: Rows | None = None
    """Which output rows of a packed matrix belong to this site; None for all."""
    expert: int | None = None
    """Which matrix of a stack (experts, …) held in one 3-D parameter."""
    entry: str | None = None
    """Module path whose input is the site's input, where it is not `path` itself."""
    width: int | None = None
    """Feature width of a hidden site."""
    dtype: torch.dtype = torch.float32
    """Type of trained parameters."""
    key: str = ""
    """Unique name of this site in the model, the prefix of its tensors in files."""
    ties: list[tuple[str, nn.Module, str]] = field(default_factory=list)
    """Other (path, module, name) that hold the very same tensor; only trained copies follow a tie."""
    peers: list[Site] = field(default_factory=list)
    """All sites the same specification is attached to, this one included."""
    tower: Tower | None = None
    """The tower of a site on the token sequence, see `inlay.core.towers`."""
    trunk: Trunk | None = None
    """The stack of blocks beside which a method stands, see `inlay.core.trunks`."""
    parts: list[str] = field(default_factory=list)
    """Paths of the attentions that a site of a tower takes in, or of the blocks that are read beside a trunk."""
    pixels: tuple[int, int, int] | None = None
    """(channels, height, width) of the images, where they enter."""
    inlay: Inlay | None = None
    uses: set[str] = field(default_factory=set)
    """Names of the shared tensors that the method here asked for."""
    built: dict[type, nn.Module] = field(default_factory=dict)
    """The methods built here, by class."""
    hears: dict[str, Source] = field(default_factory=dict)
    """The places whose outputs the method here asks for with `heard`, by neutral name."""

    # ------------------------------------------------------------------ matrix sites
    @property
    def parameter(self) -> Tensor:
        """The base's own stored tensor."""
        p = self.module._parameters.get(self.param)
        if p is None:
            raise SiteError(f"'{self.path}' has no parameter '{self.param}'")
        return p

    def matrix_of(self, p: Tensor) -> Tensor:
        """The rows of the stored tensor that belong to this site, (d_out, d_in)."""
        assert self.host is not None
        W = self.host.to_matrix(p)
        return W if self.rows is None else self.rows.take(W, 0)

    def part_of(self, p: Tensor) -> Tensor:
        """The same out of a tensor like the one stored, of which a stack's expert is a part."""
        return self.matrix_of(p if self.expert is None else p[self.expert])

    def stored_from(self, W: Tensor, like: Tensor) -> Tensor:
        """The stored tensor `like` with this site's rows replaced by W."""
        assert self.host is not None
        if self.rows is not None:
            W = self.rows.put(self.host.to_matrix(like).to(W.dtype), W, 0)
        return self.host.from_matrix(W, like)

    @property
    def packed(self) -> bool:
        """Whether its tensor is one that a quantised layer stores its matrix in: codes, scales, or W by that name."""
        return is_quantised(self.module) and self.param != "bias"

    @property
    def weight(self) -> Tensor:
        """W as the base holds it, (d_out, d_in), no gradient."""
        if isinstance(self.host, QuantisedHost):
            return self.matrix_of(dense(self.module))
        return self.part_of(self.parameter.detach())

    @property
    def bias(self) -> Tensor | None:
        """This site's part of the base's bias, or None."""
        b = self.module._parameters.get(self.bias_name)
        return b if b is None else self.bias_part(b)

    @property
    def current_bias(self) -> Tensor | None:
        """The bias in what this level is given: a trained copy where there is one, with the levels below applied."""
        if self.module._parameters.get(self.bias_name) is None:
            return None
        return self.bias_part(getattr(self.module, self.bias_name))

    @property
    def bias_name(self) -> str:
        """What the module calls the bias of this tensor: `bias`, `in_proj_bias`, `bias_ih_l0`, `down_proj_bias`."""
        if isinstance(self.module, nn.MultiheadAttention):
            return "in_proj_bias"
        return self.param.replace("weight", "bias") if "weight" in self.param else f"{self.param}_bias"

    @property
    def bias_rows(self) -> Rows | None:
        """Which numbers of the bias go with this site's rows; None for all."""
        packed = self.param == "in_proj_weight" or self.rows is not None
        if isinstance(self.module, nn.MultiheadAttention) and not packed:  # three matrices, one packed bias
            return Rows("qkv".index(self.param[0]) * self.module.embed_dim, self.module.embed_dim)
        return self.rows

    def bias_part(self, b: Tensor) -> Tensor:
        """The numbers of the stored bias b that belong to this site."""
        if self.expert is not None:
            return b[self.expert]
        return b if self.bias_rows is None else self.bias_rows.take(b, 0)

    def bias_from(self, part: Tensor, b: Tensor) -> Tensor:
        """The stored bias b with this site's numbers replaced, out of place."""
        if self.expert is not None:
            return Rows(self.expert, 1).put(b, part[None], 0)
        return part if self.bias_rows is None else self.bias_rows.put(b, part, 0)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        if self.host is None:
            raise SiteError(f"'{self.path}' is not a matrix")
        if isinstance(self.host, QuantisedHost):
            d_out, d_in = shape(self.module)
            return d_out if self.rows is None else self.rows.count, d_in
        W = self.weight
        return int(W.shape[0]), int(W.shape[1])

    @property
    def d_out(self) -> int:
        return self.shape[0]

    @property
    def d_in(self) -> int:
        return self.shape[1]

    @property
    def kernel_area(self) -> int:
        """Taps of a convolution kernel, 1 elsewhere."""
        return prod(self.parameter.shape[2:]) if isinstance(self.host, ConvHost) else 1

    @property
    def groups(self) -> int:
        """Groups of a convolution, whose outputs see different inputs and cannot be mixed; 1 elsewhere."""
        return self.module.groups if isinstance(self.module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.host, EmbeddingHost)

    def apply(self, delta: Matrix, x: Tensor) -> Tensor:
        """The contribution of Δ to this site's output for the module's input x."""
        assert self.host is not None
        return self.host.apply(self.module, delta, x)

    def add(self, delta: Matrix, x: Tensor, y: Tensor) -> Tensor:
        """y plus that contribution."""
        assert self.host is not None
        return self.host.add(self.module, delta, x, y)

    def outward(self, v: Tensor, y: Tensor) -> Tensor:
        """A vector over d_out, shaped and typed to act on the module's output."""
        v = v.to(y.dtype)
        return self.host.outward(v, y) if self.host is not None else v

    def inward(self, v: Tensor, x: Tensor) -> Tensor:
        """A vector over d_in, shaped and typed to act on the module's input."""
        v = v.to(x.dtype)
        return self.host.inward(v, x) if self.host is not None else v

    # ------------------------------------------------------------------ hidden sites
    @property
    def entrances(self) -> list[str]:
        """Paths of the modules whose inputs a method at a module's output reads besides that module's own."""
        return [*([] if self.entry is None else [self.entry]), *self.parts]

    @property
    def features(self) -> int:
        """Feature width of the site's output."""
        if self.width is not None:
            return self.width
        if self.host is not None:
            return self.d_out
        raise SiteError(
            f"the feature width of '{self.path}' is unknown: name a linear module, or a block of a known model"
        )

    @property
    def parameter_device(self) -> torch.device:
        """Where this site's module lives."""
        t = next((t for tensors in (self.module.parameters(), self.module.buffers()) for t in tensors), None)
        return torch.device("cpu") if t is None else t.device

    def heard(self, name: str) -> Tensor:
        """What a place that the method `hears` has put out in the running forward, for the rows being computed."""
        assert self.inlay is not None
        source = self.hears[name]
        y = self.inlay.ears[source.path, self.path].input()
        return y if source.rows is None else source.rows.take(y, -1)

    # ------------------------------------------------------------------ shared
    def shared(self, name: str, make: Callable[[], Tensor], derived: bool = False) -> Tensor:
        """A frozen tensor that exists once per model; `make` runs on first use.

        Files name it by its digest. One that is `derived` from the base's weights, whose last bits depend on the
        machine, is named by a print that is compared within a tolerance.
        """
        assert self.inlay is not None
        self.uses.add(name)
        if derived:
            self.inlay.state.derived.add(name)
        return self.inlay.shared_tensor(name, make)

    @property
    def flat_key(self) -> str:
        """The key as part of a tensor's name, which has no dots."""
        return self.key.replace(".", "/")

    @property
    def leader(self) -> Site:
        """The one of all places of a method that holds what they train together, the same after a load."""
        return min(self.peers, key=lambda site: site.key)

    @property
    def leads(self) -> bool:
        """Whether that is this one."""
        return self.leader is self

    def shared_now(self, name: str) -> Tensor:
        """The shared tensor of that name, wherever the model has been moved since."""
        assert self.inlay is not None
        tensor = self.inlay.tensors._buffers[name]
        assert tensor is not None
        return tensor

    def role(self, pattern: str) -> bool:
        """Whether the neutral name ends with `pattern` (`attn.q`, `mlp.down`)."""
        return self.name == pattern or self.name.endswith("." + pattern)
