"""Dual encoders (CLIP, SigLIP, transformers' `VisionTextDualEncoderModel`): an image tower and a text tower that meet
in one space, where a class is the text that names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from inlay.core.anatomy import Part
from inlay.core.tracks import Track, read_track

SCALE, PROJECTION = "logit_scale", "visual_projection"
"""What every such model of transformers calls its temperature, and the last map of its images where it has one."""


@dataclass(frozen=True, eq=False)
class Joint:
    """What the text tower of a dual encoder is joined to."""

    model: nn.Module
    """The dual encoder."""
    vision: nn.Module
    """The image tower."""
    track: Track | None
    """Where its hidden states pass, if it makes some of patches."""
    images: nn.Module
    """The module that gives the image's vector, as its output or as the `pooler_output` of that."""
    width: int
    """Numbers in that vector."""


def is_dual(model: nn.Module) -> bool:
    """Whether a model compares every image with every text of a call: its rows of texts are no rows of images."""
    return SCALE in model._parameters


def read_joint(modules: Mapping[str, nn.Module], parts: Mapping[str, Part], root: str, end: str | None) -> Joint | None:
    """The joint of a dual encoder, by the parts of its image tower (names without prefix) and where it lies.

    None for other models, and for those whose towers are inside another model.
    """
    model, vision, projection = modules[""], modules[root], modules.get(PROJECTION)
    if not is_dual(model):
        return None
    track = read_track(modules, parts, end)
    if isinstance(projection, nn.Linear):
        return Joint(model, vision, track, projection, projection.out_features)
    config: Any = model.config
    return Joint(model, vision, track, vision, config.vision_config.hidden_size)
