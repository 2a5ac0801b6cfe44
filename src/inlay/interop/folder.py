"""The two files of a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inlay.core.errors import CheckpointError
from inlay.core.files import atomic, write_text

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def open_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) as they are in the files.

    Raises:
        CheckpointError: a file is missing, damaged, or a pickle.
    """
    config = folder / CONFIG
    if not config.is_file():
        inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        tip = f"; it holds adapters in its folders {', '.join(inner)}: name one of them" if inner else ""
        raise CheckpointError(f"{folder} holds no {CONFIG}" + (tip if folder.is_dir() else " (no such folder)"))
    try:
        document = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{config} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{config} is not a configuration but a {type(document).__name__}")
    return document, open_tensors(folder)


def open_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.is_file():
        if (folder / PICKLE).exists():
            raise CheckpointError(
                f"{folder} holds {PICKLE}, a pickle, which can run code when it is opened and which inlay never opens. "
                "Convert it where you trust it: load it with PEFT and call save_pretrained(folder)"
            )
        raise CheckpointError(f"{folder} holds no {TENSORS}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error


def save_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files atomically, the tensors first."""
    ready = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic(folder / TENSORS) as temporary:
        save_file(ready, temporary, metadata={"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
