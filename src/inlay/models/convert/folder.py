"""Writing the files of a Hugging Face model folder."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

# Pillow's codes for resampling filters, as preprocessor_config.json stores them
BILINEAR, BICUBIC = 2, 3
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def save_weights(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write `model.safetensors` and `config.json`."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    save_json(folder / "config.json", config)


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_processor(folder: Path, mean: tuple[float, ...], std: tuple[float, ...], resample: int) -> None:
    """Write `preprocessor_config.json`: shortest edge to 256, centre crop 224, 0..1, then (x - mean) / std."""
    save_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": 256},
            "resample": resample,
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(mean),
            "image_std": list(std),
        },
    )


def load_checkpoint(content: bytes) -> dict[str, torch.Tensor]:
    """Tensors of a `torch.save` file, read without running any pickled code."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
