"""Adapters of other libraries, read and written; what is needed for that is imported when it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inlay.core.adapter import Adapter


def export_peft(adapter: Adapter, folder: str | Path) -> Path:
    """Write an adapter as a Hugging Face PEFT folder; returns it. See `inlay.interop.peft.write`.

    Raises:
        CheckpointError: PEFT cannot express the adapter; the sentence says what and why.
    """
    from inlay.interop.peft import write

    return write(adapter, folder)
