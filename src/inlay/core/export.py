"""Exporting a merged model as an ordinary folder, loaded again and compared with the adapted model before it counts."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.active import attached
from inlay.core.calls import first_output
from inlay.core.errors import MergeError
from inlay.core.merge import TOLERANCE, difference, merge, unmerge
from inlay.core.quantised import dense_layers

RECORD = "inlay_export.json"


def export(
    model: nn.Module,
    folder: str | Path,
    *names: str,
    probe: dict[str, Tensor] | None = None,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Write base and adapters merged, as a folder that `from_pretrained` opens; the model itself stays as it was.

    A quantised base is written dense, with the numbers that it computes with.

    Args:
        folder: must not exist, or be empty.
        names: adapters to merge, the active ones when none is named.
        probe: inputs on which the written model is compared with the adapted one; a fixed random batch when omitted.
        tolerance: largest accepted difference of outputs relative to the largest output; by default that of the
            base's type (1e-5 in float32).

    Returns:
        The record that is also written to `inlay_export.json`: adapters, difference, tolerance, probe shapes.

    Raises:
        MergeError: a method that cannot be merged, a folder in use, or outputs that differ by more than the tolerance
        (nothing is then written).
    """
    inlay = attached(model)
    names = names or tuple(inlay.active)
    probe = probe or random_probe(model)
    training = model.training
    model.eval()
    try:
        with new_folder(folder) as temporary:
            with torch.no_grad(), inlay.only(*names):
                adapted = first_output(model(**probe))
            merge(model, *names, dequantise=True)  # what is written is dense, whatever the base is stored in
            try:
                with dense_layers(model):
                    write_base(model, temporary)
            finally:
                unmerge(model)
            with torch.no_grad():
                written = first_output(reopen(model, temporary)(**probe))
            dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
            limit = TOLERANCE[dtype] if tolerance is None else tolerance
            error = difference(adapted, written)
            record = {
                "adapters": list(names), "difference": error, "tolerance": limit,
                "dtype": str(dtype).removeprefix("torch."),
                "probe": {name: list(t.shape) for name, t in probe.items()},
            }  # fmt: skip
            if not error <= limit:
                raise MergeError(
                    f"the exported model differs from the adapted one by {error:.2e} (tolerance {limit:.0e})"
                )
            (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return record
    finally:
        model.train(training)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that takes its place and name when the context ends well; MergeError where that is in use."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise MergeError(f"{folder} exists and is not empty: choose another folder to export to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        for file in temporary.iterdir():
            os.chmod(file, 0o644)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_base(model: nn.Module, folder: Path) -> None:
    """The base's tensors and configuration, without `model.inlay`."""
    save: Callable[..., Any] | None = getattr(model, "save_pretrained", None)
    if save is None:
        raise MergeError(f"{type(model).__name__} has no save_pretrained: merge it and save its state_dict yourself")
    config: Any = model.config
    tied = getattr(config, "tie_word_embeddings", False)
    tensors = {name: t for name, t in model.state_dict().items() if not name.startswith("inlay.")}
    try:
        if tied and untied(model):
            config.tie_word_embeddings = False  # embedding and output layer now differ
        save(folder, state_dict={name: t.clone() for name, t in tensors.items()})
    finally:
        if tied:
            config.tie_word_embeddings = tied


def untied(model: nn.Module) -> bool:
    """Whether merging gave the input and output embeddings different tensors."""
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    return head is not None and embed._parameters["weight"] is not head._parameters["weight"]


def reopen(model: nn.Module, folder: Path) -> nn.Module:
    """The written model, opened as a user would."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    config: Any = model.config
    cls: Any = type(model)
    again = cls.from_pretrained(folder, dtype=dtype, attn_implementation=config._attn_implementation)
    return again.eval().to(next(model.parameters()).device)


def random_probe(model: nn.Module) -> dict[str, Tensor]:
    """A fixed random batch that fits the model: token ids, pixels or audio, from its configuration."""
    generator = torch.Generator("cpu").manual_seed(0)
    config: Any = getattr(model, "config", None)
    name: str = getattr(model, "main_input_name", "")
    device = next(model.parameters()).device
    if config is None or not name:
        raise MergeError(f"give probe inputs: inlay does not know what {type(model).__name__} takes")
    if name == "pixel_values":
        size, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
        dtype = next(p.dtype for p in model.parameters())
        return {name: torch.randn(2, channels, size, size, generator=generator).to(device, dtype)}
    if name != "input_ids":
        raise MergeError(f"give probe inputs: {type(model).__name__} takes '{name}'")
    ids = torch.randint(config.vocab_size, (2, 16), generator=generator).to(device)
    probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return probe | ({"decoder_input_ids": ids[:, :4]} if config.is_encoder_decoder else {})
