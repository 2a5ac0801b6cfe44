"""Two decoders written out by hand, around an attention that the test gives."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v), (batch, heads, tokens, size) each, to the output (batch, tokens, width) before its projection."""


def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ) v with heads repeated; (batch, heads, tokens, size) each, allowed (batch, 1, queries, keys)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~allowed, -1e30)  # not −∞: padding on the left sees nothing
    weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def heads(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def causal(mask: Tensor) -> Tensor:
    """Which keys a query may see: real tokens up to itself, (batch, 1, queries, keys)."""
    n = mask.shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]


def llama(model: nn.Module, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """The logits of a Llama of heads of size 8."""
    body, size = model.model, 8

    def norm(module: nn.Module, h: Tensor) -> Tensor:
        return module.weight * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)

    def turn(t: Tensor) -> Tensor:
        angles = positions[:, None, :, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
        cos, sin = (torch.cat([f(angles), f(angles)], -1) for f in (torch.cos, torch.sin))
        return t * cos + torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1) * sin

    h = body.embed_tokens.weight[x]
    for i, layer in enumerate(body.layers):
        a, z = layer.self_attn, norm(layer.input_layernorm, h)
        q, k, v = (heads(z @ m.weight.T, size) for m in (a.q_proj, a.k_proj, a.v_proj))
        h = h + attend(i, turn(q), turn(k), v) @ a.o_proj.weight.T
        z, m = norm(layer.post_attention_layernorm, h), layer.mlp
        h = h + (F.silu(z @ m.gate_proj.weight.T) * (z @ m.up_proj.weight.T)) @ m.down_proj.weight.T
    return norm(body.norm, h) @ model.lm_head.weight.T


def gpt2(model: nn.Module, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """The logits of a GPT-2 of heads of size 8."""
    body = model.transformer
    h = body.wte.weight[x] + body.wpe.weight[positions]
    for i, layer in enumerate(body.h):
        z = layer.ln_1(h)
        q, k, v = (heads(t, 8) for t in (z @ layer.attn.c_attn.weight + layer.attn.c_attn.bias).chunk(3, -1))
        h = h + attend(i, q, k, v) @ layer.attn.c_proj.weight + layer.attn.c_proj.bias
        m = layer.mlp
        z = layer.ln_2(h) @ m.c_fc.weight + m.c_fc.bias
        h = h + F.gelu(z, approximate="tanh") @ m.c_proj.weight + m.c_proj.bias
    return body.ln_f(h) @ model.lm_head.weight.T


WRITTEN = {"llama": llama, "gpt2": gpt2}
