"""From `where` to the places where a model reads images: its pixels, and the hidden states made of its patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from inlay.core.anatomy import Part
from inlay.core.errors import SiteError
from inlay.core.method import InsertedMethod, Method, PixelMethod
from inlay.core.sites import Site
from inlay.core.towers import keyed, towers, under

if TYPE_CHECKING:
    from inlay.core.where import Finder, Pattern


def image_sites(
    finder: Finder, method: InsertedMethod | PixelMethod, patterns: Sequence[Pattern], dtype: torch.dtype
) -> list[Site]:
    """One site per place where images enter that the patterns name; for the whole model the first of them."""
    if isinstance(method, PixelMethod):
        places = list(pixel_sites(finder, method, patterns))
    else:
        places = list(inserted_sites(finder, method))
    left_out = {part.name for pattern in finder.exclude for part in finder.parts(pattern)}
    chosen: dict[str, Site] = {}
    for pattern in patterns:
        names = {name for part in finder.parts(pattern) for name in (part.name, part.path)}
        fits = places[:1] if pattern == "" else [site for site in places if names & {site.name, site.path}]
        if not fits:
            raise SiteError(
                f"{method.label()} goes where images enter ({' or '.join(repr(site.name) for site in places)}), not to "
                f"'{pattern}'; give the other methods their places with `.on(…)`"
            )
        chosen |= {site.key: site for site in fits if site.name not in left_out and method.acts_at(site)}
    if not chosen or finder.layers is not None:
        where = f"{list(patterns)}" + (f" in layers {list(finder.layers)}" if finder.layers is not None else "")
        raise SiteError(f"{method.label()} finds no place where images enter at {where}")
    sites = list(chosen.values())
    for site in sites:
        site.dtype, site.peers = dtype, sites
    return sites


# ---------------------------------------------------------------------- hidden states of patches
def inserted_sites(finder: Finder, method: InsertedMethod) -> Iterator[Site]:
    """The vision towers."""
    known = [tower for tower in towers(finder.model, finder.anatomy) if tower.track is not None]
    if not known:
        raise SiteError(
            f"{method.label()} puts vectors among the hidden states of image patches, and "
            f"{type(finder.model).__name__} (architecture {finder.anatomy.architecture or 'unknown'}) has no tower of "
            "them that inlay knows"
        )
    for tower in known:
        assert tower.track is not None
        yield Site(
            tower.root, tower.module, tower.embed, key=keyed(tower, "inserted"), width=tower.track.width, tower=tower
        )


# ---------------------------------------------------------------------- pixels
def pixel_sites(finder: Finder, method: Method, patterns: Sequence[Pattern]) -> Iterator[Site]:
    """The modules that read pixels; of an unknown architecture those that are named, or the model itself."""
    entries = list(entrances(finder)) or [part for pattern in patterns for part in finder.parts(pattern)]
    for part in entries:
        conv = first_convolution(finder.modules[part.path])
        if conv is None:
            raise SiteError(
                f"{method.label()} acts on images, and '{part.name or type(finder.model).__name__}' has no convolution "
                "that could read them"
            )
        size = finder.image_size or stated_size(finder, part.path)
        if size is None:
            raise SiteError(
                f"{method.label()} must know the size of the images, which the configuration of "
                f"{type(finder.model).__name__} does not state: inlay.adapt(…, image_size=224)"
            )
        height, width = (size, size) if isinstance(size, int) else size
        key = f"{part.path}.pixels".lstrip(".")
        yield Site(part.path, finder.modules[part.path], part.name, key=key, pixels=(conv.in_channels, height, width))


def entrances(finder: Finder) -> Iterator[Part]:
    """The modules that pixels enter, in models of known anatomy."""
    for label in finder.anatomy.n_blocks:
        prefix = f"{label}." if label else ""
        embed, patch, stem = (finder.anatomy.parts.get(prefix + name) for name in ("embed", "patch", "stem"))
        part = embed if embed and patch and under(patch.path, embed.path) else patch or stem
        if part is not None and first_convolution(finder.modules[part.path]) is not None:
            yield part


def first_convolution(module: nn.Module) -> nn.Conv2d | None:
    """The convolution over images that a module begins with, by the order in which it holds them."""
    found = (m for m in module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d))
    conv = next(found, None)
    return conv if isinstance(conv, nn.Conv2d) else None


def stated_size(finder: Finder, path: str) -> int | tuple[int, int] | None:
    """The size of images in the configuration that is nearest to a module."""
    words = path.split(".") if path else []
    for n in range(len(words), -1, -1):
        config: Any = getattr(finder.modules[".".join(words[:n])], "config", None)
        size = getattr(config, "image_size", None)
        if isinstance(size, int):
            return size
        if isinstance(size, list | tuple):
            height, width = size
            return height, width
    return None
