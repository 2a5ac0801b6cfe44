"""Towers: where a token sequence enters a network, and the attention modules it meets there.

A tower is one stack of blocks with its embedding in front: a whole encoder or decoder, the encoder of a T5, the text
half of a CLIP. Methods on the token sequence have towers for sites: a prompt goes before a tower's input embeddings, a
prefix before the keys and values of some of its attentions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inlay.core.anatomy import Anatomy, Attention, Part, anatomy
from inlay.core.base import base_modules
from inlay.core.dual import Joint, read_joint
from inlay.core.errors import CheckpointError, SiteError
from inlay.core.method import AttentionMethod, Method, PrefixMethod, PromptMethod, SideAttentionMethod, TokenMethod
from inlay.core.projections import Projection, projection
from inlay.core.sites import Site
from inlay.core.tracks import Track, read_track

if TYPE_CHECKING:
    from inlay.core.where import Finder, Pattern


@dataclass(frozen=True, eq=False)
class Spot:
    """One attention module."""

    path: str
    module: nn.Module
    name: str
    """Neutral name: `block[3].attn`, `decoder.block[3].cross`."""
    depth: int
    heads: int
    """Key-value heads."""
    size: int
    """Features per head."""
    width: int
    """Features that keys are made from."""
    is_cross: bool
    query: Projection | None
    key: Projection
    value: Projection | None

    @property
    def queries(self) -> int:
        """Query heads; 0 where their projection is unknown."""
        return 0 if self.query is None else self.query.d_out // self.size

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, before rotary positions, and values (heads, p, size) of hidden states x (p, width)."""
        assert self.value is not None
        return self.key.heads(x, self.heads), self.value.heads(x, self.heads)

    def within(self, part: Part) -> bool:
        """Whether a place is this attention or around it."""
        return part.name == self.name or under(self.path, part.path)

    def around(self, part: Part) -> bool:
        """Whether a place is inside this attention."""
        return part.name.startswith(self.name + ".") or under(part.path, self.path)


@dataclass(frozen=True, eq=False)
class Tower:
    """One stack of blocks and its embedding."""

    label: str
    """Prefix of its neutral names; empty for a lone tower."""
    root: str
    module: nn.Module
    embed: str
    """Neutral name of its embedding."""
    table: nn.Embedding | None
    """The table of token ids; None where tokens are no ids."""
    embedding: nn.Embedding | None
    """The same; None where the forward takes no embeddings in their stead."""
    positions: nn.Embedding | None
    """The table of absolute positions, where there is one."""
    trim: nn.Module | None
    """The module after which virtual tokens are cut, as pooling follows inside the tower; None: after the tower."""
    decoder: nn.Module | None
    """The module that attends to this tower's output, virtual tokens included; they are never cut then."""
    spots: tuple[Spot, ...]
    track: Track | None
    """Where hidden states pass, if the tokens are patches of an image."""
    joint: Joint | None
    """What a text tower is joined to in a dual encoder."""
    blocks: tuple[nn.Module, ...]
    """Its blocks, where they are modules."""

    def at(self, paths: Iterable[str]) -> list[Spot]:
        """The attention modules with these paths; CheckpointError if one is not there."""
        known = {spot.path: spot for spot in self.spots}
        missing = [path for path in paths if path not in known]
        if missing:
            raise CheckpointError(f"the model has no attention at '{missing[0]}' that a prefix can stand before")
        return [known[path] for path in paths]

    @torch.no_grad()
    def embedded(self, ids: list[int]) -> Tensor:
        """The input embeddings (len(ids), d) of some token ids."""
        assert self.table is not None
        return self.table(torch.tensor(ids, device=self.table.weight.device))


def towers(model: nn.Module, known: Anatomy | None = None) -> list[Tower]:
    """The towers of a model of known anatomy, that which reads the model's tokens first."""
    known = known or anatomy(model)
    modules = base_modules(model, remove_duplicate=False)
    found = [read_tower(modules, known, label) for label in known.n_blocks]
    entry = known.name_of(known.embed) if known.embed is not None else None
    return sorted(found, key=lambda tower: tower.embed != entry)


def tower_of(model: nn.Module, label: str, root: str) -> Tower:
    """The tower of that label; CheckpointError if the model has none there."""
    for tower in towers(model):
        if (tower.label, tower.root) == (label, root):
            return tower
    raise CheckpointError(f"the model has no tower '{label}' at '{root}': wrong base?")


def arguments(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's forward, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def under(path: str, root: str) -> bool:
    """Whether a module path is `root` or below it; everything is below the empty path."""
    return root == "" or path == root or path.startswith(root + ".")


# ---------------------------------------------------------------------- reading the anatomy
def read_tower(modules: Mapping[str, nn.Module], known: Anatomy, label: str) -> Tower:
    """One tower."""
    prefix = f"{label}." if label else ""
    parts = {name.removeprefix(prefix): part for name, part in known.parts.items() if name.startswith(prefix)}
    spots = tuple(spot for a in known.attention if a.tower == label for spot in read_spot(modules, parts, prefix, a))
    embed, trim = parts.get("embed"), known.trims.get(label)
    inside = [embed.path, trim] if embed and trim is not None else [spot.path for spot in spots]
    root = common(inside)
    table = modules[embed.path] if embed else None
    places = modules[parts["embed.position"].path] if "embed.position" in parts else None
    listening = [a.tower for a in known.attention if a.is_cross and a.tower != label]
    decoder = None
    if listening and not any(spot.is_cross for spot in spots):
        decoder = read_tower(modules, known, listening[0]).module
    return Tower(
        label, root, modules[root], f"{prefix}embed",
        table if isinstance(table, nn.Embedding) else None,
        table if isinstance(table, nn.Embedding) and "inputs_embeds" in arguments(modules[root]) else None,
        places if isinstance(places, nn.Embedding) else None,
        modules[trim] if trim and "pool" in parts and under(parts["pool"].path, root) else None,
        decoder, spots, read_track(modules, parts, trim), joint_of(modules, known, label),
        tuple(modules[part.path] for name, part in parts.items() if name == f"block[{part.depth}]"),
    )  # fmt: skip


def joint_of(modules: Mapping[str, nn.Module], known: Anatomy, label: str) -> Joint | None:
    """What a text tower is joined to in a dual encoder."""
    other = {n.removeprefix("vision."): part for n, part in known.parts.items() if n.startswith("vision.")}
    if label != "text" or not other:
        return None
    root = common([part.path for name, part in other.items() if name != "proj"])
    return read_joint(modules, other, root, known.trims.get("vision"))


def read_spot(modules: Mapping[str, nn.Module], parts: dict[str, Part], prefix: str, a: Attention) -> Iterator[Spot]:
    """An attention and the shapes of its keys, if its key projection is known."""
    block = f"block[{a.depth}]"
    name = f"{block}.{'cross' if a.is_cross else 'attn'}"
    query, value = (projection(modules, parts.get(f"{name}.{role}")) for role in "qv")
    key = projection(modules, parts.get(f"{name}.k"), parts.get(f"{block}.k_norm"))
    if key is not None:
        size = key.d_out // a.n_kv_heads
        yield Spot(
            a.path, modules[a.path], prefix + name, a.depth, a.n_kv_heads, size, key.d_in, a.is_cross, query, key, value
        )


def common(paths: list[str]) -> str:
    """The innermost module path that all of these are at or under."""
    shared = []
    for words in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return ".".join(shared)


# ---------------------------------------------------------------------- from `where` to sites
def token_sites(
    finder: Finder, method: TokenMethod | AttentionMethod, patterns: Iterable[Pattern], dtype: torch.dtype
) -> list[Site]:
    """One site per tower that the patterns name, that which reads the model's tokens when they name none."""
    known = towers(finder.model, finder.anatomy)
    if not known:
        raise SiteError(
            f"{method.label()} must know where tokens enter the model, but the architecture of "
            f"{type(finder.model).__name__} is unknown to inlay"
        )
    sites: dict[str, Site] = {}
    left_out = [part for pattern in finder.exclude for part in finder.parts(pattern)]
    for pattern in patterns:
        parts = finder.parts(pattern)
        if isinstance(method, PromptMethod):
            found = [prompt_site(method, tower) for tower in entered(method, known, pattern, parts)]
            found = [site for site in found if site.name not in {part.name for part in left_out}]
        else:
            at = attention_site if isinstance(method, AttentionMethod | SideAttentionMethod) else prefix_site
            found = [
                at(method, tower, spots) for tower in known if (spots := chosen(tower, parts, left_out, finder.layers))
            ]
        for site in found:
            site.dtype = dtype
            if site.key in sites:
                sites[site.key].parts += [path for path in site.parts if path not in sites[site.key].parts]
            elif method.acts_at(site):
                sites[site.key] = site
    if not sites or (isinstance(method, PromptMethod) and finder.layers is not None):
        where = f" in layers {list(finder.layers)}" if finder.layers is not None else ""
        raise SiteError(
            f"{method.label()} finds no input embeddings at {list(patterns)}{where}" if isinstance(method, PromptMethod)
            else f"{method.label()} finds no attention at {list(patterns)}{where} that goes through transformers' "
            "attention interface, where a method can act on its queries and keys"
        )  # fmt: skip
    for site in sites.values():
        site.peers = list(sites.values())
        if isinstance(method, SideAttentionMethod):
            depth = {spot.path: spot.depth for spot in spots_of(site)}
            site.parts = sorted(depth, key=depth.__getitem__)[-method.layers :]
    return list(sites.values())


def spots_of(site: Site) -> list[Spot]:
    """The attentions of a site."""
    assert site.tower is not None
    return site.tower.at(site.parts)


def entered(method: PromptMethod, known: list[Tower], pattern: Pattern, parts: list[Part]) -> list[Tower]:
    """The towers whose embeddings the places are, the first when the place is the model."""
    if pattern == "":
        return known[:1]
    found = [tower for tower in known if any(tower.embed == part.name or tower.root == part.path for part in parts)]
    if not found:
        names = " or ".join(f"'{tower.embed}'" for tower in known)
        raise SiteError(
            f"{method.label()} goes before the input embeddings ({names}), not to '{pattern}'; "
            "give the other methods their places with `.on(…)`"
        )
    return found


def chosen(tower: Tower, parts: list[Part], left_out: list[Part], layers: tuple[int, ...] | None) -> list[Spot]:
    """The attentions of a tower that the places name."""
    return [
        spot for spot in tower.spots
        if any(spot.within(part) or spot.around(part) for part in parts)
        and not any(spot.within(part) for part in left_out)
        and (layers is None or spot.depth in layers)
    ]  # fmt: skip


def prompt_site(method: PromptMethod, tower: Tower) -> Site:
    if tower.embedding is None:
        raise SiteError(
            f"{method.label()} puts vectors before the input embeddings, but {type(tower.module).__name__} takes none: "
            "its forward has no `inputs_embeds`, or its tokens are no ids"
        )
    # heads on causal models find a row's last token by the user's ids
    if method.keep and any(getattr(spot.module, "is_causal", False) for spot in tower.spots):
        raise SiteError(f"{method.label()}: keep is for encoders that pool; {type(tower.module).__name__} is causal")
    return Site(
        tower.root, tower.module, tower.embed, key=keyed(tower, "prompt"), width=tower.embedding.embedding_dim,
        tower=tower,
    )  # fmt: skip


def prefix_site(method: Method, tower: Tower, spots: list[Spot]) -> Site:
    if isinstance(method, PrefixMethod) and method.shift and "position_ids" not in arguments(tower.module):
        raise SiteError(
            f"{method.label()}: {type(tower.module).__name__} takes no position ids, so none can be shifted"
        )
    if len({(spot.heads, spot.size) for spot in spots}) > 1:
        raise SiteError(f"{method.label()}: the attentions of '{tower.root}' differ in shape; name those of one shape")
    return Site(
        tower.root, tower.module, keyed(tower, "attn", tower.label), key=keyed(tower, "prefix"), width=spots[0].width,
        tower=tower, parts=[spot.path for spot in spots],
    )  # fmt: skip


def attention_site(method: Method, tower: Tower, spots: list[Spot]) -> Site:
    """The causal attentions among these; SiteError where there are none, or one computes more than attention."""
    if isinstance(method, SideAttentionMethod):
        blind = [spot for spot in spots if spot.query is None or spot.value is None]
        if blind:
            raise SiteError(f"{method.label()} needs the projections of '{blind[0].path}', which inlay does not know")
    causal = [spot for spot in spots if getattr(spot.module, "is_causal", False)]
    if not causal or any(spot.is_cross for spot in tower.spots):
        why = "attends to an encoder" if causal else "has no causal attention"
        raise SiteError(f"{method.label()} is for decoders that stand alone: {type(tower.module).__name__} {why}")
    for spot in causal:
        foreign = FOREIGN & handed_over(spot.module)
        if foreign:
            raise SiteError(
                f"{method.label()} computes plain causal attention, but {type(spot.module).__name__} also has "
                f"{', '.join(sorted(foreign))}"
            )
    return Site(
        tower.root, tower.module, keyed(tower, "attn", tower.label), key=keyed(tower, "attention"),
        width=causal[0].width, tower=tower, parts=[spot.path for spot in causal],
    )  # fmt: skip


FOREIGN = frozenset(("s_aux", "softcap", "position_bias"))
"""What some attentions hand over besides queries, keys and values that plain attention has no place for."""


def handed_over(module: nn.Module) -> set[str]:
    """Names of the keyword arguments in calls of a module's forward, that of the attention function among them."""
    constants = inspect.unwrap(type(module).forward).__code__.co_consts
    return {name for names in constants if isinstance(names, tuple) for name in names if isinstance(name, str)}


def keyed(tower: Tower, word: str, before: str | None = None) -> str:
    before = tower.root if before is None else before
    return f"{before}.{word}" if before else word
