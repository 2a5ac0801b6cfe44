"""The small residual network that looks at an image and says how a prompt is mixed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128)
"""Channels of its four blocks; from the second on each halves the image."""


def convolution(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)


class Block(nn.Module):
    """ReLU(B₂(C₂ ReLU(B₁(C₁ x))) + S x), with a strided pointwise convolution S where the image is halved."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        stride = 1 if c_in == c_out else 2
        self.conv1, self.norm1 = convolution(c_in, c_out, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.norm2 = convolution(c_out, c_out), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet10(nn.Module):
    """Images (batch, c, side, side) ↦ logits (batch, outputs)."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.stem, self.norm = convolution(channels, WIDTHS[0], 2), nn.BatchNorm2d(WIDTHS[0])
        widths = zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)
        self.blocks = nn.Sequential(*(Block(c_in, c_out) for c_in, c_out in widths))
        self.head = nn.Linear(WIDTHS[-1], outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def count(channels: int, outputs: int) -> int:
        """Parameters in closed form."""
        c, widths = WIDTHS[0], zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)
        blocks = sum(9 * n * (m + n) + 4 * n + (m * n + n if m != n else 0) for m, n in widths)
        return 9 * channels * c + 2 * c + blocks + (WIDTHS[-1] + 1) * outputs

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(torch.mean(self.blocks(x), (2, 3)))
