"""What a saved adapter says about its training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from inlay.recipe import Recipe, as_dict
from inlay.work import Work


def about(recipe: Recipe, work: Work, metrics: dict[str, float], validation: dict[str, float]) -> dict[str, Any]:
    """Enough to evaluate and to use the adapter without the recipe."""
    prepared = work.prepared
    return {
        "model": recipe.model,
        "task": work.task,
        "labels": work.data.labels,
        "template": prepared.template,
        "max_length": prepared.max_length,
        "image_size": recipe.image_size,
        "metrics": {"test": metrics, "validation": validation},
        "data": {"name": work.data.name, "fingerprint": work.data.fingerprint},
        "recipe": as_dict(replace(recipe, output=Path(recipe.output).name)),
        "note": work.opened.note,
    }
