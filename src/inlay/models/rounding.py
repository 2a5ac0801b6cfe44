"""What storing a model's linear layers in few bits loses, and where: numbers clipped, numbers rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from inlay.core.affine import AffineLinear, Grid
from inlay.models.quantise import check_kind, linear_layers, quantised


@dataclass(frozen=True)
class Rounding:
    """The squared error of one layer in shares of ‖W‖², as (clipping, rounding)."""

    path: str
    shape: tuple[int, int]
    norm: float
    """‖W‖²."""
    widest: tuple[float, float]
    """On the grid from each group's smallest to its largest number."""
    used: tuple[float, float]
    """On the grid that is used, for every group the one of least error. NormalFloat has only one, and clips nothing."""
    clip: float
    """Its range as a share of the widest one's, mean over groups."""

    @property
    def relative(self) -> float:
        """‖W − Ŵ‖ / ‖W‖ as used."""
        return sum(self.used) ** 0.5

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"relative": self.relative}

    @classmethod
    def total(cls, layers: Sequence[Rounding]) -> Rounding:
        """All layers as one."""
        norm = sum(layer.norm for layer in layers)
        (a, b), (c, d) = (
            tuple(sum(getattr(layer, name)[i] * layer.norm for layer in layers) / norm for i in (0, 1))
            for name in ("widest", "used")
        )
        clip = sum(layer.clip for layer in layers) / len(layers)
        return cls("all", (len(layers), sum(r.shape[0] * r.shape[1] for r in layers)), norm, (a, b), (c, d), clip)


@torch.no_grad()
def rounding(model: nn.Module, kind: str, head: Sequence[str] = (), group: int | None = None) -> list[Rounding]:
    """What `inlay.models.quantise.quantise` would lose at every layer; the model stays as it is."""
    check_kind(kind, group)
    return [of_layer(path, layer, kind, group) for path, layer in linear_layers(model, head).items()]


def of_layer(path: str, layer: nn.Linear, kind: str, group: int | None) -> Rounding:
    stored, W = quantised(layer, kind, group), layer.weight.detach().float()
    norm, shape = float(W.square().sum()), (layer.out_features, layer.in_features)
    if not isinstance(stored, AffineLinear):
        error = (0.0, float((stored.dequantize().float() - W).square().sum()) / norm)
        return Rounding(path, shape, norm, error, error, 1.0)
    widest = Grid.of(W, stored.bits, stored.scale.shape[1])
    used = Grid(stored.scale.float(), stored.get_buffer("zero").float(), stored.bits)
    (a, b), (c, d) = (tuple(part / norm for part in grid.split_error(W)) for grid in (widest, used))
    return Rounding(path, shape, norm, (a, b), (c, d), float((used.scale / widest.scale).mean()))
