"""Packaged weights to ordinary Hugging Face folders: one file per source format.

A converter is called with the archive and an empty folder, and leaves there `config.json`, `model.safetensors` and
the tokenizer's or image processor's files. Those of `lit` train a model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from inlay.models.convert import lit
from inlay.models.convert.bert import gte_small, minilm
from inlay.models.convert.convnets import mobilenetv2, resnet50
from inlay.models.convert.dinov2 import dinov2_small
from inlay.models.convert.gguf import smollm2
from inlay.models.convert.llama2c import stories15m

CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    "minilm": minilm,
    "gte-small": gte_small,
    "stories15m": stories15m,
    "smollm2-135m-instruct": smollm2,
    "dinov2-small": dinov2_small,
    "mobilenetv2": mobilenetv2,
    "resnet50": resnet50,
    "lit-mobilenetv2": lit.mobilenetv2,
    "lit-dinov2-small": lit.dinov2_small,
}
