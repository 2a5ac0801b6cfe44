"""Side networks: small networks that read what enters a trunk and write what leaves it.

Their tensors are kept in the adapter's own type and used in that of the activations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Remember = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, keys, values) of new tokens ↦ those of all tokens so far."""


def linear(layer: nn.Linear, h: Tensor) -> Tensor:
    """h Wᵀ + b in the type of h."""
    return F.linear(h, layer.weight.to(h.dtype), None if layer.bias is None else layer.bias.to(h.dtype))


def normed(layer: nn.LayerNorm, h: Tensor) -> Tensor:
    """LayerNorm in the type of h."""
    return F.layer_norm(h, layer.normalized_shape, layer.weight.to(h.dtype), layer.bias.to(h.dtype), layer.eps)


def typed(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module's tensors this type; left alone where they have it, as tensors without storage must be."""
    if any(p.dtype != dtype for p in module.parameters()):
        module.to(dtype)


# ---------------------------------------------------------------------- sequences
class SideLayer(nn.Module):
    """h ← h + attention(LN h);  h ← h + W₂ gelu(W₁ LN h)."""

    def __init__(self, r: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(r), nn.LayerNorm(r)
        self.qkv, self.o = nn.Linear(r, 3 * r), nn.Linear(r, r)
        self.up, self.down = nn.Linear(r, 4 * r), nn.Linear(4 * r, r)

    def forward(self, h: Tensor, seen: Tensor | None, number: int, past: int | None, remember: Remember) -> Tensor:
        qkv = linear(self.qkv, normed(self.norm1, h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if past is not None:
            q, k = rotated(q, past), rotated(k, past)
        k, v = remember(number, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        h = h + linear(self.o, y.transpose(1, 2).flatten(2))
        return h + linear(self.down, F.gelu(linear(self.up, normed(self.norm2, h))))


class SequenceNetwork(nn.Module):
    """S(x) = W_up LN(T_L … T_1(W_down x)): a slim transformer of width r over the tokens.

    Beside a decoder it is causal and has rotary positions of its own, as what enters a decoder's blocks often tells no
    position; elsewhere positions are in x.
    """

    def __init__(self, d_in: int, d_out: int, r: int, layers: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.enter, self.leave, self.norm = nn.Linear(d_in, r), nn.Linear(r, d_out), nn.LayerNorm(r)
        self.layers = nn.ModuleList(SideLayer(r, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None, past: int, remember: Remember) -> Tensor:
        """S(x) for tokens x (batch, n, d) of which `past` others were read before; `mask` (batch, past + n)."""
        seen = visible(mask, x.shape[1], past, x.device) if self.causal else only(mask)
        h = linear(self.enter, x)
        for number, layer in enumerate(self.layers):
            h = layer(h, seen, number, past if self.causal else None, remember)
        return linear(self.leave, normed(self.norm, h))


def sequence_count(d_in: int, d_out: int, r: int, layers: int) -> int:
    """Trained numbers of a `SequenceNetwork`."""
    return r * (d_in + d_out + 1) + d_out + 2 * r + layers * (12 * r * r + 13 * r)


def only(mask: Tensor | None) -> Tensor | None:
    """Which keys are real, for every query (batch, 1, 1, keys)."""
    return None if mask is None else mask[:, None, None, :]


def visible(mask: Tensor | None, n: int, past: int, device: torch.device) -> Tensor:
    """Which keys each of n new tokens sees (batch or 1, 1, n, past + n): real ones up to itself, and always itself."""
    place = torch.arange(past + n, device=device)
    here = place[past:, None]
    before = (place <= here)[None, None]
    return before if mask is None else (before & mask[:, None, None, :]) | (place == here)


def rotated(h: Tensor, past: int) -> Tensor:
    """Rotary positions from `past` on, on the two halves of h (batch, heads, n, size); an odd last one stays."""
    half = h.shape[-1] // 2
    rate = 10000.0 ** (-torch.arange(half, device=h.device) / half)
    angle = torch.arange(past, past + h.shape[2], device=h.device)[:, None] * rate
    c, s = angle.cos().to(h.dtype), angle.sin().to(h.dtype)
    a, b = h[..., :half], h[..., half : 2 * half]
    return torch.cat([a * c - b * s, a * s + b * c, h[..., 2 * half :]], -1)


# ---------------------------------------------------------------------- maps
class MapNetwork(nn.Module):
    """S(x) = W_up relu(C_L(… relu(C_1(W_down x)))): 3×3 convolutions of stride 2 and width r, pooled to size."""

    def __init__(self, c_in: int, c_out: int, r: int, layers: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(c_in, r, 1), nn.Conv2d(r, c_out, 1)
        self.layers = nn.ModuleList(nn.Conv2d(r, r, 3, stride=2, padding=1) for _ in range(layers))

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """S(x) for a map x (batch, channels, height, width), of this height and width."""
        h = convolved(self.enter, x)
        for layer in self.layers:
            h = F.relu(convolved(layer, h))
        return convolved(self.leave, F.adaptive_avg_pool2d(h, (int(size[0]), int(size[1]))))


def map_count(c_in: int, c_out: int, r: int, layers: int) -> int:
    """Trained numbers of a `MapNetwork`."""
    return r * (c_in + c_out + 1) + c_out + layers * (9 * r * r + r)


def convolved(layer: nn.Module, h: Tensor) -> Tensor:
    """A convolution in the type of h."""
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    return layer._conv_forward(h, layer.weight.to(h.dtype), layer.bias.to(h.dtype))
