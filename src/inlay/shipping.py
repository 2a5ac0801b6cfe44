"""A saved adapter and its base as one ordinary model folder, with the tokenizer or image processor they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inlay.core.export import export, new_folder
from inlay.core.merge import merge, unmerge
from inlay.data.prepare import size_options
from inlay.evaluate.run import Adapted
from inlay.models.fewbits import save_few_bits
from inlay.models.quiet import quiet


def write_merged(found: Adapted, folder: str | Path) -> dict[str, Any]:
    """Write the merged model of an opened adapter, and its processor as it was in training.

    The chat template and the image size of training go into the processor, so that whoever opens the folder feeds the
    model what it was trained on.

    Returns:
        The record of `inlay.core.export.export`.

    Raises:
        MergeError: see there.
    """
    with quiet():
        record = export(found.opened.model, folder)
    write_processor(found, folder)
    return record


def write_few_bits(found: Adapted, folder: str | Path) -> dict[str, Any]:
    """The same with every quantised layer stored as it was, which `inlay.models.open` reads; see `requantise`.

    Returns:
        `difference` of the merge before rounding, and what rounding each layer again cost: `rounding` by path with
        `rounding_mean` and `rounding_worst`, relative Frobenius errors; none where scales alone have changed (PEQA).

    Raises:
        MergeError: an adapter that cannot be merged, a base that is not quantised or not by inlay, a folder in use.
    """
    model = found.opened.model
    with new_folder(folder) as temporary:
        merged = merge(model, requantise=True)
        try:
            save_few_bits(model, temporary)
        finally:
            unmerge(model)
    write_processor(found, folder)
    return {
        "difference": merged.difference, "rounding_mean": merged.mean, "rounding_worst": merged.worst,
        "rounding": merged.rounding,
    }  # fmt: skip


def write_processor(found: Adapted, folder: str | Path) -> None:
    """The tokenizer or image processor beside a written model, as it was in training."""
    processor, about = found.opened.processor, found.about
    if about.get("image_size"):
        for name, value in size_options(processor, about["image_size"]).items():
            setattr(processor, name, value)
    if about.get("template"):
        processor.chat_template = about["template"]
    processor.save_pretrained(folder)
