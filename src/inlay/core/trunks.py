"""Trunks: a stack of blocks as one piece, from what enters the first block to what leaves the stack.

Methods beside a trunk (side networks, parallel layers) read what its blocks are given and change what it gives, after
the last block, so nothing of theirs lies below any frozen layer. With no other trained tensors in it the trunk runs
without a graph: no activation of it is kept, and no gradient enters it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.anatomy import Anatomy, anatomy
from inlay.core.base import base_modules
from inlay.core.errors import CheckpointError, SiteError
from inlay.core.hosts import host_of
from inlay.core.method import HiddenMethod
from inlay.core.sites import Site

if TYPE_CHECKING:
    from inlay.core.where import Finder, Pattern

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Trunk:
    """One stack of blocks."""

    label: str
    """Its tower's prefix of neutral names; empty for a lone one."""
    path: str
    """Module whose output is the trunk's: the last normalisation, or the stack."""
    module: nn.Module
    blocks: tuple[str, ...]
    stack: tuple[nn.Module, ...]
    """The blocks themselves."""
    width_in: int
    """Features, or channels, of what enters the first block."""
    width: int
    """Those of what leaves the trunk."""
    of_maps: bool
    """Whether these are maps (batch, channels, height, width) rather than sequences (batch, tokens, features)."""
    causal: bool


class SideMethod(HiddenMethod):
    """Stands beside a whole trunk: `after(x, y)` is given what enters its first block and what leaves its last."""

    kind: ClassVar[str] = "output"
    reads_blocks: ClassVar[bool] = False
    """Whether it asks what entered the other blocks (those that `layers` of `inlay.adapt` chooses), see `entering`."""

    @property
    def trunk(self) -> Trunk:
        """The trunk beside which this built copy stands."""
        assert self.site.trunk is not None
        return self.site.trunk

    def entering(self) -> list[Tensor]:
        """What entered each chosen block in the running forward, for the rows that are being computed."""
        inlay = self.site.inlay
        assert inlay is not None
        return [inlay.spans[path, self.site.path].input() for path in self.site.parts]

    def mask(self, x: Tensor, past: int = 0) -> Tensor | None:
        """The real tokens (batch, past + tokens) of a sequence x (batch, tokens, features); None: all of them."""
        inlay = self.site.inlay
        assert inlay is not None
        mask = inlay.call.mask
        if mask is None or self.trunk.of_maps or self.trunk.label.startswith(("vision", "audio")):
            return None  # the call's mask is that of the text
        if mask.shape != (x.shape[0], past + x.shape[1]):
            raise SiteError(
                f"{self.label()}: the attention mask is {tuple(mask.shape)} where the tokens are "
                f"({x.shape[0]}, {past + x.shape[1]})"
            )
        return mask


def trunks(model: nn.Module, known: Anatomy | None = None) -> list[Trunk]:
    """The trunks of a model of known anatomy, that which reads the model's input first."""
    known = known or anatomy(model)
    modules = base_modules(model, remove_duplicate=False)
    return [trunk for label in labels(known) if (trunk := read(modules, known, label)) is not None]


def labels(known: Anatomy) -> list[str]:
    """The towers of a model, that which reads its input first."""
    entry = known.name_of(known.embed) if known.embed is not None else None
    return sorted(known.n_blocks, key=lambda label: (f"{label}.embed" if label else "embed") != entry)


def stack_of(known: Anatomy, label: str) -> tuple[str, ...]:
    """Paths of a tower's blocks; empty where they are no modules."""
    prefix = f"{label}." if label else ""
    parts = [known.parts.get(f"{prefix}block[{i}]") for i in range(known.n_blocks[label])]
    return tuple(part.path for part in parts if part is not None) if all(parts) else ()


def trunk_of(model: nn.Module, label: str) -> Trunk:
    """The trunk of that label; CheckpointError if the model has none."""
    for trunk in trunks(model):
        if trunk.label == label:
            return trunk
    raise CheckpointError(f"the model has no stack of blocks '{label}': wrong base?")


def read(modules: dict[str, nn.Module], known: Anatomy, label: str) -> Trunk | None:
    """The trunk of a tower, None where its blocks are no modules or their widths are unknown."""
    prefix, blocks = f"{label}." if label else "", stack_of(known, label)
    crossed = any(a.is_cross for a in known.attention if a.tower == label)  # what it reads is not one sequence
    if not blocks or crossed:
        return None
    neck = known.parts.get(f"{prefix}neck")
    end = known.trims.get(label) or (neck.path if neck is not None else blocks[-1])
    first, last = modules[blocks[0]], modules[end]
    inner = [m for m in first.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
    maps = [m for m in first.modules() if isinstance(m, CONVOLUTIONS)] if not inner else []
    if maps:
        leaving = [m for m in last.modules() if isinstance(m, CONVOLUTIONS)]
        widths = maps[0].in_channels, leaving[-1].out_channels if leaving else 0
    else:
        width = width_of(modules, known, prefix)
        widths = width, width
    if not all(widths):
        return None
    # attention says whether it is causal; a state-space mixer is by its nature
    causal = any(getattr(m, "is_causal", False) for m in first.modules()) or f"{prefix}block[0].mixer" in known.parts
    stack = tuple(modules[path] for path in blocks)
    return Trunk(label, end, last, blocks, stack, *widths, bool(maps), causal)


def width_of(modules: dict[str, nn.Module], known: Anatomy, prefix: str) -> int:
    """Features of the sequence that runs through the blocks: what a projection that ends one writes; 0 if unknown."""
    for last in ("mlp.down", "attn.o", "mixer.out"):
        part = known.parts.get(f"{prefix}block[0].{last}")
        host = host_of(modules[part.path]) if part is not None else None
        weight = modules[part.path]._parameters.get("weight") if part is not None else None
        if host is not None and weight is not None:
            return int(host.to_matrix(weight).shape[0])
    return 0


# ---------------------------------------------------------------------- from `where` to sites
def trunk_sites(finder: Finder, method: SideMethod, patterns: Iterable[Pattern], dtype: torch.dtype) -> list[Site]:
    """One site per trunk that the patterns name, that which reads the model's input when they name none."""
    known = trunks(finder.model, finder.anatomy)
    if not known:
        raise SiteError(
            f"{method.label()} stands beside a stack of blocks, and inlay knows none in {type(finder.model).__name__}"
        )
    chosen: dict[str, Trunk] = {}
    for pattern in patterns:
        for trunk in named(finder, known, pattern):
            chosen.setdefault(trunk.label, trunk)
    sites = []
    for trunk in chosen.values():
        parts = list(trunk.blocks) if method.reads_blocks else []
        if finder.layers is not None:
            if not method.reads_blocks:
                raise SiteError(f"{method.label()} stands beside the whole stack: layers cannot be chosen")
            parts = [trunk.blocks[i] for i in finder.layers if i < len(trunk.blocks)]
        name = f"{trunk.label}.trunk" if trunk.label else "trunk"
        site = Site(
            trunk.path, trunk.module, name, param="", entry=trunk.blocks[0], width=trunk.width, dtype=dtype,
            key=trunk.path, parts=parts, trunk=trunk,
        )  # fmt: skip
        if method.acts_at(site):
            sites.append(site)
    for site in sites:
        site.peers = sites
    return sites


def named(finder: Finder, known: list[Trunk], pattern: Pattern) -> list[Trunk]:
    """The trunks that a pattern names, by a place in them; the first when the place is the model."""
    if pattern == "":
        return known[:1]
    parts = finder.parts(pattern)
    return [trunk for trunk in known if any(at(part.path, trunk) for part in parts)]


def at(path: str, trunk: Trunk) -> bool:
    """Whether a module is the trunk's end, one of its blocks, inside one, or around all of them."""
    inside = any(path == block or path.startswith(f"{block}.") for block in trunk.blocks)
    around = all(block.startswith(f"{path}.") for block in trunk.blocks)
    return path == trunk.path or inside or around
