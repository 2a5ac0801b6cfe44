"""Tracks: the way of a vision tower's hidden states, from the embedding of its patches through the blocks to pooling.

A method may put vectors of its own among these hidden states, see `inlay.core.inserted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from inlay.core.anatomy import Part

if TYPE_CHECKING:
    from inlay.core.sites import Site


@dataclass(frozen=True, eq=False)
class Track:
    """Where the sequence of hidden states [class token, patches] passes."""

    path: str
    """Path of `entry`."""
    entry: nn.Module
    """The module that outputs the sequence, positions added; normalisation before the blocks comes after it."""
    patch: nn.Conv2d
    """What makes vectors of patches; it reads the pixels."""
    blocks: tuple[nn.Module, ...]
    end: nn.Module | None
    """The module after which only pooling and heads follow; None: the tower itself."""
    at: int
    """Where inserted vectors stand: after the class token, or first where there is none."""

    @property
    def width(self) -> int:
        """Features d of a hidden state."""
        return self.patch.out_channels


def track_of(site: Site) -> Track:
    """The track of a site among the hidden states of a vision tower."""
    assert site.tower is not None
    assert site.tower.track is not None
    return site.tower.track


def read_track(modules: Mapping[str, nn.Module], parts: Mapping[str, Part], end: str | None) -> Track | None:
    """The track of a tower whose tokens are patches of an image, by its parts' names without prefix; None of others."""
    patch, embed = parts.get("patch"), parts.get("embed")
    conv = modules[patch.path] if patch else None
    if embed is None or not isinstance(conv, nn.Conv2d):
        return None
    blocks = [part.path for name, part in parts.items() if name == f"block[{part.depth}]"]
    return Track(
        embed.path, modules[embed.path], conv, tuple(modules[path] for path in blocks),
        modules[end] if end else None, int("embed.class" in parts),
    )  # fmt: skip
