"""Data sets: by embedded name, file, folder or Hugging Face name, and as batches for a model."""

from inlay.data.loading import fetch, load, names
from inlay.data.prepare import Prepared, prepare
from inlay.data.preview import preview, render_preview
from inlay.data.rows import TASKS, Data, DataError, Row, Rows

__all__ = [
    "TASKS",
    "Data",
    "DataError",
    "Prepared",
    "Row",
    "Rows",
    "fetch",
    "load",
    "names",
    "prepare",
    "preview",
    "render_preview",
]
