"""Dual encoders (CLIP, SigLIP, transformers' `VisionTextDualEncoderModel`): an image tower and a text tower that meet
in one space, where a class is the text that names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

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
    projection: nn.Linear | None
    """What maps its pooled vectors to where texts are, if it is a module of the model."""
    width: int
    """Numbers of the vectors in which texts and images meet."""

    def vectors(self, output: Any) -> Tensor:
        """The images' vectors at length 1, from what the image tower gives."""
        pooled = output.pooler_output
        return F.normalize(pooled if self.projection is None else self.projection(pooled), dim=-1)


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
    return Joint(model, vision, track, None, config.vision_config.hidden_size)
