"""Dual encoders (CLIP, SigLIP, transformers' `VisionTextDualEncoderModel`): an image tower and a text tower that meet
in one space, where a class is the text that names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from inlay.core.anatomy import Anatomy, anatomy
from inlay.core.contexts import ContextMethod
from inlay.core.errors import SiteError
from inlay.core.sites import Site
from inlay.core.towers import PROJECTION, Tower, common, joint_width, towers

if TYPE_CHECKING:
    from inlay.core.where import Finder, Pattern


@dataclass(frozen=True, eq=False)
class Dual:
    """The parts of a dual encoder that class prompts and images meet in."""

    model: nn.Module
    text: Tower
    vision: str
    """Path of the image tower."""
    images: nn.Module
    """The module that gives the image's vector, as its output or as the `pooler_output` of that."""


def is_dual(model: nn.Module) -> bool:
    """Whether a model compares every image with every text of a call: its rows of texts are no rows of images."""
    return joint_width(model) is not None


def dual(model: nn.Module, known: Anatomy | None = None) -> Dual:
    """The two towers of a model; SiteError where it is no dual encoder that inlay knows."""
    known = known or anatomy(model)
    text = next((tower for tower in towers(model, known) if tower.label == "text" and tower.table is not None), None)
    places = [part.path for name, part in known.parts.items() if name.startswith("vision.") and name != "vision.proj"]
    if not is_dual(model) or text is None or not places:
        raise SiteError(
            f"{type(model).__name__} is no image-text model with two towers (CLIP, SigLIP, VisionTextDualEncoder): "
            "there are no class prompts to act on"
        )
    vision = common(places)
    return Dual(model, text, vision, model._modules.get(PROJECTION) or model.get_submodule(vision))


def context_sites(finder: Finder, method: ContextMethod, patterns: Sequence[Pattern], dtype: torch.dtype) -> list[Site]:
    """The text tower of a dual encoder, the one place that contexts have."""
    text = dual(finder.model, finder.anatomy).text
    other = [p for p in patterns if p != "" and text.embed not in {part.name for part in finder.parts(p)}]
    if other or finder.layers is not None:
        raise SiteError(f"{method.label()} fills the class prompts at '{text.embed}', its one place: leave `where` out")
    assert text.table is not None
    site = Site(
        text.root, text.module, text.embed, key=f"{text.root}.context", width=text.table.embedding_dim, tower=text,
        dtype=dtype,
    )  # fmt: skip
    site.peers = [site]
    return [site]
