"""Tiny random vision models, and their forward passes written out by hand with vectors among the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from token_models import TEXT, lively
from torch import Tensor, nn

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
         "image_size": 16, "patch_size": 8}  # fmt: skip
TOWERS = ("vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model", "siglip_vision_model")


def tower(kind: str, auto: Any = transformers.AutoModel, attention: str | None = None, **more: Any) -> Any:
    """A model whose only tower is that of images, four patches each."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **more})
    if attention is not None:
        config._attn_implementation = attention
    return lively(auto.from_config(config))


def clip() -> Any:
    torch.manual_seed(7)
    return lively(transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=SMALL)))


def resnet(**more: Any) -> Any:
    torch.manual_seed(7)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3, **more
    )
    return lively(transformers.ResNetForImageClassification(config))


def images(batch: int = 4, side: int = 16, seed: int = 1, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(seed))


def by_hand(model: Any, x: Tensor, put: Callable[[int, Tensor], Tensor], cut: Callable[[Tensor], Tensor]) -> Tensor:
    """`last_hidden_state` where `put(i, h)` is what enters block i, and `cut` what leaves the last one."""
    h = put(0, model.embeddings(x))
    kind = model.config.model_type
    if kind == "clip_vision_model":
        h = model.pre_layrnorm(h)
    blocks = (
        model.layers if kind in ("vit", "deit") else model.encoder.layer if "dino" in kind else model.encoder.layers
    )
    for i, block in enumerate(blocks):
        h = block(h if i == 0 else put(i, h), None)
    h = cut(h)
    if kind == "clip_vision_model":
        return h
    return model.post_layernorm(h) if "siglip" in kind else model.layernorm(h)


class TimmBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn, self.mlp = nn.Module(), nn.Sequential()
        self.attn.qkv, self.attn.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.attn.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(self.norm2(x))


class Timm(nn.Module):
    """A vision transformer in timm's spelling, whose blocks take no mask, pooling all tokens but the first."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, d, 8, 8)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, 5, d))
        self.pos_drop, self.norm, self.head = nn.Dropout(0.0), nn.LayerNorm(d), nn.Linear(d, 3)
        self.blocks = nn.Sequential(TimmBlock(d), TimmBlock(d))

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        h = self.pos_drop(torch.cat([self.cls_token.expand(len(h), -1, -1), h], 1) + self.pos_embed)
        return self.head(self.norm(self.blocks(h))[:, 1:].mean(1))
