"""DINOv2 with registers: Meta's key names to `Dinov2WithRegistersModel`."""

from __future__ import annotations

from pathlib import Path

import torch

from inlay.archives import read_one
from inlay.models.convert.folder import (
    BICUBIC,
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_checkpoint,
    save_processor,
    save_weights,
)

# Meta's spelling and transformers', for a weight and bias each
_RENAMED = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}


def dinov2_small(archive: Path, folder: Path) -> None:
    """ViT-S/14 with four registers; position table for 518 pixels, interpolated by the model for other sizes."""
    from transformers import Dinov2WithRegistersConfig

    source = load_checkpoint(read_one(archive, r"/dinov2s\.pt$"))
    state = {
        f"embeddings.{target}": source.pop(name)
        for name, target in (
            ("cls_token", "cls_token"),
            ("mask_token", "mask_token"),
            ("register_tokens", "register_tokens"),
            ("pos_embed", "position_embeddings"),
        )
    }
    for name, value in source.items():
        state.update(_block(name, value) if name.startswith("blocks.") else _outer(name, value))

    width = state["embeddings.cls_token"].shape[-1]
    patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    config = Dinov2WithRegistersConfig(
        hidden_size=width,
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in source if name.startswith("blocks.")),
        num_attention_heads=width // 64,
        image_size=patch * round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        num_register_tokens=state["embeddings.register_tokens"].shape[1],
        architectures=["Dinov2WithRegistersModel"],
    )
    save_weights(folder, state, config.to_diff_dict())
    save_processor(folder, IMAGENET_MEAN, IMAGENET_STD, BICUBIC)


def _outer(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    module, _, parameter = name.rpartition(".")
    return {f"{_RENAMED[module]}.{parameter}": value}


def _block(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    _, index, rest = name.split(".", 2)
    layer = f"encoder.layer.{index}"
    module, _, parameter = rest.rpartition(".")
    if module == "attn.qkv":
        parts = value.chunk(3)
        return {f"{layer}.attention.{p}_proj.{parameter}": part for p, part in zip("qkv", parts, strict=True)}
    if module in ("ls1", "ls2"):
        return {f"{layer}.layer_scale{module[-1]}.lambda1": value}
    return {f"{layer}.{'attention.o_proj' if module == 'attn.proj' else module}.{parameter}": value}
