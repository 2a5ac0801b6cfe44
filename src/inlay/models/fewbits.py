"""Model folders whose linear layers are stored in few bits: written from a quantised model, read by `open`.

Beside the configuration there is one `model.safetensors` with the layers' codes and scales, and a record that says how
each layer is stored. transformers cannot open such a folder; `inlay merge` without `--requantise` writes one it can.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inlay.core.affine import AffineLinear
from inlay.core.errors import MergeError
from inlay.models.catalogue import ModelError
from inlay.models.quantise import NF4Linear

RECORD, TENSORS = "inlay_quantised.json", "model.safetensors"


def stored_in_few_bits(folder: str | Path) -> bool:
    """Whether `save_few_bits` wrote it."""
    return (Path(folder) / RECORD).exists()


def save_few_bits(model: nn.Module, folder: Path) -> None:
    """Write a quantised model without what is attached to it; MergeError where no layer is stored in few bits."""
    layers = {path: described(m) for path, m in model.named_modules() if isinstance(m, NF4Linear | AffineLinear)}
    if not layers:
        raise MergeError("no layer of the base is stored in few bits: merge without requantising")
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for name, t in model.state_dict().items():
        if name.startswith("inlay."):
            continue
        key = (t.data_ptr(), tuple(t.shape))
        if t.numel() and key in first:
            same[name] = first[key]
            continue
        first[key], tensors[name] = name, t.detach().cpu().contiguous().clone()
    config: Any = model.config
    config.save_pretrained(folder)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / RECORD).write_text(json.dumps({"layers": layers, "same": same}, indent=1) + "\n", encoding="utf-8")


def described(layer: NF4Linear | AffineLinear) -> dict[str, Any]:
    """How one layer is stored."""
    if isinstance(layer, NF4Linear):
        return {"kind": "nf4"}
    return {"kind": "affine", "bits": layer.bits, "groups": layer.scale.shape[1]}


def hollow_layer(old: nn.Linear, about: dict[str, Any]) -> NF4Linear | AffineLinear:
    """A layer of that storage, on the meta device."""
    empty = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta", dtype=old.weight.dtype)
    return NF4Linear(empty) if about["kind"] == "nf4" else AffineLinear(empty, about["bits"], about["groups"])


def open_few_bits(auto: Any, folder: str, dtype: torch.dtype, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(model, what transformers would report of loading) for a folder of `save_few_bits`.

    Raises:
        ModelError: tensors that do not fit the configuration.
    """
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    record = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    tensors = load_file(Path(folder) / TENSORS)
    tensors |= {name: tensors[first] for name, first in record["same"].items()}
    with no_init_weights():
        model = auto.from_config(AutoConfig.from_pretrained(folder, **settings), dtype=dtype)
    for path, about in record["layers"].items():
        parent, _, name = path.rpartition(".")
        old = model.get_submodule(path)
        assert isinstance(old, nn.Linear)
        model.get_submodule(parent).register_module(name, hollow_layer(old, about))
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{folder} does not hold the model its configuration speaks of: {error}") from error
    model.tie_weights()
    return model.to(dtype), {"missing_keys": set(), "mismatched_keys": set()}
