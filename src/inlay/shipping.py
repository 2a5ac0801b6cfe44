"""A saved adapter and its base as one ordinary model folder, with the tokenizer or image processor they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inlay.core.export import export
from inlay.data.prepare import size_options
from inlay.evaluate.run import Adapted
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
    processor, about = found.opened.processor, found.about
    with quiet():
        record = export(found.opened.model, folder)
    if about.get("image_size"):
        for name, value in size_options(processor, about["image_size"]).items():
            setattr(processor, name, value)
    if about.get("template"):
        processor.chat_template = about["template"]
    processor.save_pretrained(folder)
    return record
