from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.errors import AdapterError, OptionError
from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.core.trunks import SideMethod
from inlay.methods.output.sidenetwork import MapNetwork, SequenceNetwork, map_count, sequence_count, typed

if TYPE_CHECKING:
    from torch.optim import Optimizer


@register
class SideTuning(SideMethod):
    """y ← α B(x) + (1 − α) S(x), B the frozen trunk and S a small network beside it, both read x.

    x is what enters the first block (embedded tokens or patches, the stem's map), y what leaves the last norm. S is a
    slim transformer of width r beside sequences, a small convolutional network beside maps; it starts at random, as no
    distilled one is to be had. No gradient enters the trunk and none of its activations is kept. The blend α is σ(a)
    with a trained a, starts at one half, and says in the end how much the base is used; or it is fixed, or falls from
    the base to the side network while it is trained: linearly, or as k/(k + steps).

    In generation S keeps its keys and values in the base's own cache.
    """

    paper: ClassVar[str] = "Zhang et al. 2019, arXiv 1912.13503"
    learning_rate: ClassVar[float] = 3e-3
    stacks: ClassVar[bool] = False  # a network of its own, with a cache of its own

    r: int = option(default=64, doc="width of S", low=1)
    depth: int = option(default=2, doc="layers of S", low=1)
    heads: int = option(default=4, doc="attention heads of S, beside sequences", low=1)
    init: Literal["random", "zero"] = option(
        default="random", doc="random: S as drawn; zero: its last layer at zero, so that y starts as α B(x)"
    )
    blend: Literal["learned", "fixed", "linear", "hyperbolic"] = option(
        default="learned",
        doc="α = σ(a) with a trained; `alpha` all along; from `alpha` to `end` over the run; k/(k + N)",
    )
    alpha: float = option(default=0.5, doc="α at the start; hyperbolic blends start at 1", low=0.0, high=1.0)
    end: float = option(default=0.0, doc="α at the end of a linear blend", low=0.0, high=1.0)
    k: float = option(default=100.0, doc="steps after which a hyperbolic α is one half", low=0.0)

    def validate(self) -> None:
        if self.r % self.heads:
            raise OptionError(f"SideTuning: the width r = {self.r} must be a multiple of the {self.heads} heads")
        if self.blend == "learned" and not 0 < self.alpha < 1:
            raise OptionError("SideTuning: a learned α starts between 0 and 1, both excluded: blend='fixed' for an end")
        if self.blend == "fixed" and self.alpha == 1:
            raise OptionError("SideTuning: with α = 1 throughout the side network would have no part in the output")
        if self.blend == "hyperbolic" and self.k == 0:
            raise OptionError("SideTuning: k is a number of steps, above 0")

    @property
    def starts_at_base(self) -> bool:
        return self.blend == "hyperbolic" or (self.blend == "linear" and self.alpha == 1)

    def build(self, site: Site) -> None:
        trunk = self.trunk
        self.side: MapNetwork | SequenceNetwork
        if trunk.of_maps:
            self.side = MapNetwork(trunk.width_in, trunk.width, self.r, self.depth)
        else:
            self.side = SequenceNetwork(trunk.width_in, trunk.width, self.r, self.depth, self.heads, trunk.causal)
        if self.init == "zero":
            for p in self.side.leave.parameters():
                nn.init.zeros_(p)
        typed(self.side, site.dtype)
        if self.blend == "learned":
            self.a = nn.Parameter(torch.tensor(math.log(self.alpha / (1 - self.alpha)), dtype=site.dtype))
        elif self.blend != "fixed":
            self.register_buffer("now", torch.tensor(self.scheduled(0, 0.0), dtype=torch.float32))
            self.register_buffer("taken", torch.tensor(0))

    def count(self, site: Site) -> int:
        assert site.trunk is not None
        ends, learned = (site.trunk.width_in, site.trunk.width), self.blend == "learned"
        return (map_count if site.trunk.of_maps else sequence_count)(*ends, self.r, self.depth) + learned

    # ------------------------------------------------------------------ the blend
    def share(self) -> Tensor | float:
        """α now."""
        if self.blend == "learned":
            assert isinstance(self.a, Tensor)
            return self.a.sigmoid()
        return self.alpha if self.blend == "fixed" else self.get_buffer("now")

    def scheduled(self, taken: int, progress: float) -> float:
        """α of a scheduled blend after so many steps, at this share of the run."""
        if self.blend == "hyperbolic":
            return self.k / (self.k + taken)
        return self.alpha + (self.end - self.alpha) * progress

    def step(self, progress: float, optimizer: Optimizer | None) -> None:
        if self.blend in ("linear", "hyperbolic"):
            taken = self.get_buffer("taken").add_(1)
            self.get_buffer("now").fill_(self.scheduled(int(taken), progress))

    # ------------------------------------------------------------------ the forward
    def after(self, x: Tensor, y: Tensor) -> Tensor:
        s = self.beside_map(x, y) if self.trunk.of_maps else self.beside_sequence(x)
        alpha = self.share()
        return (alpha * y + (1 - alpha) * s).to(y.dtype)

    def beside_map(self, x: Tensor, y: Tensor) -> Tensor:
        return self.side(x, y.shape[2:])

    def beside_sequence(self, x: Tensor) -> Tensor:
        assert self.site.inlay is not None
        call = self.site.inlay.call
        past = call.past if self.trunk.causal else 0
        return self.side(x, self.mask(x, past), past, Memory(self, call.cache, past).remember)


class Memory:
    """The keys and values of a side network in the base's own cache, so that beams and crops are followed."""

    def __init__(self, owner: SideTuning, cache: Any, past: int) -> None:
        self.owner, self.cache, self.past = owner, cache if owner.trunk.causal else None, past

    def remember(self, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far in one layer of the side network."""
        if self.cache is None:
            if self.past:
                raise AdapterError(
                    f"{self.owner.label()} needs its part of the cache, which is not there where rows are routed or "
                    "the first call was given no cache: generate with one adapter at a time, or with use_cache=False"
                )
            return k, v
        if self.cache.is_compileable:
            raise AdapterError(f"a static cache has no room for {self.owner.label()}: generate with the default one")
        layer = self.layer(number)
        if layer.get_seq_length() != self.past:
            raise AdapterError(
                f"the cache holds {self.past} tokens, but {layer.get_seq_length()} of {self.owner.label()}: it was "
                "filled by another adapter; start generation anew"
            )
        return layer.update(k, v)

    def layer(self, number: int) -> Any:
        """A layer of the cache, behind those of the base."""
        from transformers.cache_utils import DynamicLayer

        assert self.cache is not None
        mark = (id(self.owner), number)
        for layer in self.cache.layers:
            if layer.__dict__.get("beside") == mark:
                return layer
        made = DynamicLayer()
        made.__dict__["beside"] = mark
        self.cache.layers.append(made)
        return made
