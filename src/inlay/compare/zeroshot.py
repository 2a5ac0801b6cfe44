"""The row that nothing is trained for: images classified by the names of their classes as the base reads them."""

from __future__ import annotations

import math
from typing import Any

from inlay.core.quantised import numbers
from inlay.evaluate.predict import measure, whole
from inlay.recipe import Recipe, Row, as_dict
from inlay.report import Cell
from inlay.work import Shared, Work, open_work

WHAT_READS = ("model", "data", "columns", "task", "limit", "image_size", "prompt", "precision", "quantize",
              "quantize_group")  # fmt: skip
"""Fields of a recipe that a base without adapter depends on."""


def zero_shot(rows: list[Row], first: Work) -> list[Cell]:
    """One row for every base and prompt among the rows; none where classes are not read. `first` is the first row's."""
    found: dict[str, Cell] = {}
    asked = {str(kept(row.recipe)): row.recipe for row in rows if row.recipe.prompt is not None}
    for text, recipe in asked.items():
        same = text == str(kept(rows[0].recipe))
        work = first if same else open_work(recipe, shared=Shared())
        label = "Zero-shot" if len(asked) == 1 else f"Zero-shot ({recipe.model}, “{recipe.prompt}”)"
        metrics = measure(whole(work), work, "test", recipe.evaluate_batch)
        found[label] = cell(label, kept(recipe), metrics, numbers(work.model.modules()))
    return list(found.values())


def kept(recipe: Recipe) -> dict[str, Any]:
    return {name: value for name, value in as_dict(recipe).items() if name in WHAT_READS}


def cell(label: str, settings: dict[str, Any], metrics: dict[str, float], base: int) -> Cell:
    unmeasured: Any = math.nan
    return Cell(
        method=label, kind="baseline", seed=0, settings=settings, error=None, metrics=metrics, adapter_parameters=0,
        head_parameters=0, base_parameters=base, file_bytes=0, train_seconds=unmeasured, peak_memory_bytes=unmeasured,
        saved_for_backward_bytes=unmeasured,
    )  # fmt: skip
