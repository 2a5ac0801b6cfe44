"""BERT text encoders: MiniLM from safetensors, gte-small from an ONNX export."""

from __future__ import annotations

import json
from pathlib import Path

from inlay.archives import read
from inlay.models.convert import onnx
from inlay.models.convert.folder import save_weights

_CONFIG_FILES = r"(config|tokenizer|tokenizer_config|special_tokens_map)\.json$|vocab\.txt$"


def minilm(archive: Path, folder: Path) -> None:
    """All files but the weights as they are; from the weights, `position_ids` is dropped (it holds 0, 1, 2, …)."""
    from safetensors.torch import load

    files = _files(archive, rf"/model/({_CONFIG_FILES}|model\.safetensors$)")
    state = load(files.pop("model.safetensors"))
    del state["embeddings.position_ids"]
    save_weights(folder, state, json.loads(files.pop("config.json")))
    _write(folder, files)


def gte_small(archive: Path, folder: Path) -> None:
    """Weights recovered from the ONNX graph; the export has no pooler, so neither has the folder."""
    files = _files(archive, rf"/gte-small/({_CONFIG_FILES}|onnx/model\.onnx$)")
    save_weights(folder, onnx.state_dict(files.pop("model.onnx")), json.loads(files.pop("config.json")))
    _write(folder, files)


def _files(archive: Path, pattern: str) -> dict[str, bytes]:
    return {name.rsplit("/", 1)[-1]: content for name, content in read(archive, pattern)}


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
