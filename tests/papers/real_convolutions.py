"""Convolutions with the pretrained weights of ResNet-50 and MobileNetV2, each by itself on a small map.

Beside those the networks have stand variants made of the same kernels, with other paddings, dilation, groups, a bias.
"""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay.models

RESNET = {
    "stem": "resnet.embedder.embedder.convolution",  # 7×7, stride 2
    "point": "resnet.encoder.stages.0.layers.0.layer.0.convolution",
    "kernel": "resnet.encoder.stages.0.layers.0.layer.1.convolution",  # 3×3
    "stride": "resnet.encoder.stages.1.layers.0.layer.0.convolution",  # 1×1, stride 2
    "shortcut": "resnet.encoder.stages.1.layers.0.shortcut.convolution",  # the same, wider
}
MOBILENET = {
    "stem": "mobilenet_v2.conv_stem.first_conv.convolution",  # 3×3, stride 2
    "depthwise": "mobilenet_v2.conv_stem.conv_3x3.convolution",  # 3×3, a group for each channel
    "expand": "mobilenet_v2.layer.0.expand_1x1.convolution",
    "stride": "mobilenet_v2.layer.0.conv_3x3.convolution",  # depthwise, stride 2
    "reduce": "mobilenet_v2.layer.0.reduce_1x1.convolution",
}


@functools.cache
def network(name: str) -> nn.Module:
    return inlay.models.open(name, "image-classification", num_labels=3).model.eval()


class Layers(nn.Module):
    """Layers side by side; each reads a map of its own."""

    def __init__(self, layers: dict[str, nn.Conv2d], inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.inputs = inputs

    def forward(self) -> dict[str, Tensor]:
        return {name: layer(self.inputs[name]) for name, layer in self.layers.items()}


@functools.cache
def template(name: str) -> Layers:
    paths, model = (RESNET, network("resnet50")) if name == "resnet50" else (MOBILENET, network("mobilenetv2"))
    layers = {key: conv(model.get_submodule(path)) for key, path in paths.items()}
    if name == "resnet50":
        kernel = layers["kernel"]
        layers |= {
            "reflect": variant(kernel, padding_mode="reflect"),
            "circular": variant(kernel, padding_mode="circular", stride=2),
            "dilated": variant(kernel, dilation=2, padding=2),
            "same": variant(kernel, padding="same", dilation=(1, 2)),
            "grouped": variant(kernel, groups=4),
            "biased": folded(model.get_submodule(paths["kernel"].rpartition(".")[0])),
        }
    generator = torch.Generator().manual_seed(1)
    inputs = {key: torch.randn(2, c.in_channels, 9, 8, generator=generator) for key, c in layers.items()}
    return Layers(layers, inputs).requires_grad_(False)


def layers_of(name: str) -> Layers:
    """A fresh copy."""
    return copy.deepcopy(template(name))


def conv(module: nn.Module) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    return copy.deepcopy(module)


def variant(layer: nn.Conv2d, groups: int = 1, **options: object) -> nn.Conv2d:
    """Another convolution with the same kernel, of which every group keeps its own part."""
    given = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation} | options
    made = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, groups=groups, bias=False, **given)
    made.weight.data.copy_(layer.weight[:, : layer.in_channels // groups])
    return made


def folded(block: nn.Module) -> nn.Conv2d:
    """A convolution that its batch normalisation was folded into."""
    layer, norm = conv(block.convolution), block.normalization
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    made = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    made.weight.data.copy_(layer.weight * gain[:, None, None, None])
    made.bias.data.copy_(norm.bias - norm.running_mean * gain)
    return made


def convolved(layer: nn.Conv2d, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """`F.conv2d` with the flat kernel W (c_out, …) in float64, padded by hand where that is not with zeros."""
    padding, x = layer.padding, x.double()
    if layer.padding_mode != "zeros":
        assert isinstance(padding, tuple)
        x, padding = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), layer.padding_mode), 0
    kernel = W.reshape(layer.weight.shape)
    return F.conv2d(x, kernel, b, layer.stride, padding, layer.dilation, layer.groups)
