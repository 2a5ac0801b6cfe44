"""Tokens as pixels: what a method puts among the patches of an image, written as further patches of the image.

A patch embedding is a linear map of the pixels of a patch, e = E u + b, with E (d, c·s²). Where E has rank d every
vector p is the embedding of the patch u = Eᵀ(EEᵀ)⁻¹(p − b), so a model that takes a few more patches than it has
positions for, and adds no position to those, gives with [image, u] what the adapted model gives with the image: all
that is trained stays on the caller's side (Loedeman, Stol, Han & Asano 2024, arXiv 2210.06466). The pixels of u may lie
outside of what an image file can hold and must not be clipped or rounded to 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inlay.core.active import attached
from inlay.core.errors import AdapterError, SiteError
from inlay.core.inserted import Inserted
from inlay.core.modes import evaluating


@torch.no_grad()
def patches_of(vectors: Tensor, conv: nn.Conv2d) -> Tensor:
    """The patches (…, channels, s, s) in float64, smallest in norm, whose embeddings are these vectors (…, d).

    Args:
        conv: the patch embedding, kernel = stride = s.

    Raises:
        SiteError: a convolution that is no patch embedding, or whose matrix has no rank d (c·s² < d, or singular).
    """
    if conv.kernel_size != conv.stride or conv.groups != 1 or set(conv.dilation) != {1} or set(conv.padding) != {0}:
        raise SiteError(f"{conv} is no patch embedding: its kernel must equal its stride, without padding and groups")
    E = conv.weight.double().flatten(1)
    d, m = E.shape
    if d > m:
        raise SiteError(f"a patch has {m} pixels, fewer than the {d} features of a token: not every token is one")
    Q, R = torch.linalg.qr(E.T)
    spread = R.diagonal().abs()
    if float(spread.min()) <= 1e-12 * float(spread.max()):
        raise SiteError("the patch embedding is singular: not every token is the embedding of a patch")
    p = vectors.double() if conv.bias is None else vectors.double() - conv.bias.double()
    u = torch.linalg.solve_triangular(R.T, p.flatten(0, -2).T, upper=False)
    return (Q @ u).T.reshape(*vectors.shape[:-1], conv.in_channels, *conv.kernel_size)


@torch.no_grad()
def inverted(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """What the active adapters insert for these images, as patches (batch, tokens, channels, s, s) in float64.

    Raises:
        AdapterError: no adapter that inserts tokens is active, or one that does so in later blocks (VPT-deep), which
        no pixel reaches.
    """
    inlay = attached(model)
    mounts = [m for m in inlay.state.tokens.values() if isinstance(m, Inserted) and m.inserting(inlay.active)]
    if len(mounts) != 1:
        raise AdapterError("no active adapter inserts tokens into one tower: attach PGN, or VPT with deep=False")
    track = mounts[0].track
    weight = track.patch.weight
    x, vectors = pixel_values.to(weight.device, weight.dtype), []
    with evaluating(model):
        for method in mounts[0].inserting(inlay.active):
            P = method.inserted(0, x)
            if P is None or any(method.inserted(i, x) is not None for i in range(1, len(track.blocks))):
                raise AdapterError(f"{method.label()} inserts tokens in later blocks, which no pixel reaches")
            vectors.append(P.expand(len(x), -1, -1))
    return patches_of(torch.cat(vectors, 1), track.patch)


def with_patches(pixel_values: Tensor, patches: Tensor) -> Tensor:
    """Images (batch, channels, height, width) with further rows of patches at the bottom, in reading order.

    Raises:
        ValueError: patches (batch, K, channels, s, s) that do not fill whole rows of the image.
    """
    batch, K, c, s, _ = patches.shape
    n = pixel_values.shape[3] // s
    if pixel_values.shape[3] % s or K % n:
        raise ValueError(f"{K} patches of {s} pixels fill no whole rows of images {pixel_values.shape[3]} pixels wide")
    rows = patches.reshape(batch, K // n, n, c, s, s).permute(0, 3, 1, 4, 2, 5).reshape(batch, c, K // n * s, n * s)
    return torch.cat([pixel_values.to(patches.dtype), rows], 2)
