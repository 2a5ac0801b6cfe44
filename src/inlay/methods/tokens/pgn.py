from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.method import InsertedMethod, option, register
from inlay.core.sites import Site
from inlay.core.tracks import track_of
from inlay.methods.tokens.generator import ResNet10


@register
class PGN(InsertedMethod):
    """[x_0, P(x), X] enters the first block, P = softmax(g(x))·T: for each image K mixtures of M trained vectors.

    T (M, d) is the token library; g, a ten-layer residual network on the image at `side` pixels, gives the mixtures
    (K, M). The tokens have no positions, stand before any normalisation that precedes the blocks, and are cut off
    before pooling. `inlay.methods.input.inversion` writes them as patches of pixels, so that the adapted model may be
    out of reach.
    """

    paper: ClassVar[str] = "Loedeman, Stol, Han & Asano 2024, arXiv 2210.06466"
    learning_rate: ClassVar[float] = 3e-3

    tokens: int = option(default=16, doc="tokens K per image", low=1)
    library: int = option(default=256, doc="vectors M they are mixed from", low=1)
    side: int = option(default=224, doc="side in pixels of the images that g looks at", low=4)

    def build(self, site: Site) -> None:
        self.T = nn.Parameter(0.02 * torch.randn(self.library, site.features, dtype=site.dtype))
        self.g = ResNet10(track_of(site).patch.in_channels, self.tokens * self.library).to(site.dtype)

    def count(self, site: Site) -> int:
        """M·d + 129·K·M + 306,880 + 144·c for images of c channels."""
        generator = ResNet10.count(track_of(site).patch.in_channels, self.tokens * self.library)
        return self.library * site.features + generator

    def mixture(self, x: Tensor) -> Tensor:
        """α (batch, K, M), how each token is mixed for these images (batch, channels, height, width)."""
        x = x.to(self.T.dtype)
        if x.shape[2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        return self.g(x).unflatten(1, (self.tokens, self.library)).softmax(2)

    def inserted(self, i: int, x: Tensor) -> Tensor | None:
        return self.mixture(x) @ self.T if i == 0 else None
