"""Affine quantisation: W ≈ s·(W̄ − z) with W̄ integers of a few bits, and a linear layer that stores W̄."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.errors import OptionError
from inlay.core.hollow import hollow

CLIPS = tuple(0.96 - k * 0.46 / 11 for k in range(12))
"""How far a fitted grid may be clipped: from 0.96 down to half of the largest number."""


@dataclass(frozen=True)
class Grid:
    """The numbers a row (or each group of `d_in / groups` of its entries) can take: s·(k − z), k = 0 … 2ᵇ − 1."""

    scale: Tensor
    """s (d_out, groups)."""
    zero: Tensor
    """z (d_out, groups), an integer kept as a float."""
    bits: int

    @classmethod
    def of(cls, W: Tensor, bits: int, groups: int = 1, clip: float = 1.0) -> Grid:
        """The grid between `clip` times each group's smallest and largest number, zero among its points."""
        if not 2 <= bits <= 8:
            raise OptionError(f"affine quantisation has 2 to 8 bits, got {bits}")
        if W.shape[1] % groups:
            raise OptionError(f"{W.shape[1]} inputs do not divide into {groups} groups")
        parts = W.detach().float().unflatten(1, (groups, -1))
        low, high = clip * parts.amin(-1).clamp(max=0), clip * parts.amax(-1).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
        return cls(scale, (-low / scale).round(), bits)

    @classmethod
    def fitted(cls, W: Tensor, bits: int, groups: int = 1) -> Grid:
        """Row by row the clipped grid with the least squared error, of twelve between none and half clipped."""
        best = cls.of(W, bits, groups)
        if hollow(W):
            return best  # of the same shape
        least = best.errors(W)
        for clip in CLIPS:
            other = cls.of(W, bits, groups, clip)
            errors = other.errors(W)
            better = errors < least
            least = torch.where(better, errors, least)
            best = cls(torch.where(better, other.scale, best.scale), torch.where(better, other.zero, best.zero), bits)
        return best

    def codes(self, W: Tensor) -> Tensor:
        """W̄ = clamp(⌊W/s⌉ + z, 0, 2ᵇ − 1), (d_out, d_in) in uint8."""
        parts = W.detach().float().unflatten(1, (self.scale.shape[1], -1))
        steps = (parts / self.scale[..., None]).round() + self.zero[..., None]
        return steps.clamp(0, 2**self.bits - 1).to(torch.uint8).flatten(1)

    def values(self, codes: Tensor) -> Tensor:
        """s·(W̄ − z), (d_out, d_in)."""
        parts = codes.unflatten(1, (self.scale.shape[1], -1)).to(self.scale.dtype)
        return (self.scale[..., None] * (parts - self.zero[..., None])).flatten(1)

    def errors(self, W: Tensor) -> Tensor:
        """Squared error of every group, (d_out, groups)."""
        off = self.values(self.codes(W)) - W.detach().float()
        return off.square().unflatten(1, (self.scale.shape[1], -1)).sum(-1)

    def split_error(self, W: Tensor) -> tuple[float, float]:
        """(clipping, rounding): the squared error of numbers beyond the grid's limits, and of those within."""
        ends = (torch.zeros_like(W, dtype=torch.uint8), torch.full_like(W, 2**self.bits - 1, dtype=torch.uint8))
        low, high = (self.values(end) for end in ends)
        half = (high - low) / (2**self.bits - 1) / 2
        beyond = (low - half > W) | (high + half < W)
        off = (self.values(self.codes(W)) - W.detach().float()).square()
        return float(off[beyond].sum()), float(off[~beyond].sum())


class AffineLinear(nn.Module):
    """x Ŵᵀ + b with Ŵ = s·(W̄ − z); two codes share a byte where they have four bits or fewer.

    The scale is a parameter, frozen like the rest of a base, so that it has a name of its own and a method can train a
    copy of it (PEQA).
    """

    def __init__(self, of: nn.Linear, bits: int = 8, groups: int = 1) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = of.in_features, of.out_features, bits
        grid = Grid.fitted(of.weight, bits, groups)
        self.register_buffer("codes", packed(grid.codes(of.weight)) if bits <= 4 else grid.codes(of.weight))
        self.scale = nn.Parameter(grid.scale.to(of.weight.dtype), requires_grad=False)
        self.register_buffer("zero", grid.zero.to(of.weight.dtype))
        self.bias = of.bias

    @property
    def grid(self) -> Grid:
        """Its grid, in the type it computes in."""
        return Grid(self.scale, self.get_buffer("zero"), self.bits)

    @property
    def integers(self) -> Tensor:
        """W̄ (d_out, d_in) in uint8."""
        return integers(self.get_buffer("codes"), self.bits, self.in_features)

    def dequantize(self) -> Tensor:
        """Ŵ (d_out, d_in)."""
        return self.grid.values(self.integers)

    def alike(self, layer: nn.Linear) -> AffineLinear:
        """Another layer in the same storage, on a grid of its own."""
        return AffineLinear(layer, self.bits, self.scale.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        if x.is_nested or not torch.is_grad_enabled():
            return F.linear(x, self.dequantize().to(x.dtype), self.bias)
        return Product.apply(x, self.scale, self.bias, self.get_buffer("zero"), self.get_buffer("codes"), self.bits)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, groups={self.scale.shape[1]}"


class Product(torch.autograd.Function):
    """x Ŵᵀ + b; the backward pass makes Ŵ again, where autograd would keep it for every layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bias: Tensor | None, zero: Tensor, codes: Tensor, bits: int
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale, zero, codes)
        ctx.bits, ctx.d_in, ctx.types = bits, x.shape[-1], (x.dtype, None if bias is None else bias.dtype)
        return F.linear(x, Grid(scale, zero, bits).values(integers(codes, bits, x.shape[-1])).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero, codes = ctx.saved_tensors
        k = integers(codes, ctx.bits, ctx.d_in)
        of_x = of_scale = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (g @ Grid(scale, zero, ctx.bits).values(k).to(g.dtype)).to(ctx.types[0])
        rows = g.flatten(0, -2)
        if ctx.needs_input_grad[1]:  # ∂L/∂s = Σ ∂L/∂Ŵ ⊙ (W̄ − z) over each group
            of_W, wide = rows.T @ x.flatten(0, -2).to(g.dtype), torch.promote_types(g.dtype, torch.float32)
            steps = k.unflatten(1, (scale.shape[1], -1)).to(wide) - zero[..., None].to(wide)
            of_scale = (of_W.to(wide).unflatten(1, (scale.shape[1], -1)) * steps).sum(-1).to(scale.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0).to(ctx.types[1])
        return of_x, of_scale, of_bias, None, None, None


def integers(codes: Tensor, bits: int, d_in: int) -> Tensor:
    """Codes as they are stored, one to a byte again."""
    return unpacked(codes, d_in) if bits <= 4 else codes


def packed(codes: Tensor) -> Tensor:
    """Pairs of 4-bit codes in bytes, the first in the high half; an odd row ends in a zero."""
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] << 4 | codes[:, 1::2]


def unpacked(pairs: Tensor, d_in: int) -> Tensor:
    """The reverse of `packed`."""
    return torch.stack([pairs >> 4, pairs & 15], -1).flatten(1)[:, :d_in]
