"""Methods × seeds as a grid of cells: each trained once, kept as JSON, and never trained again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inlay.core.errors import InlayError
from inlay.core.files import canonical, sha256, write_text
from inlay.core.options import options
from inlay.methods import Full, LinearProbe
from inlay.recipe import CompareRecipe, Recipe, Row, as_dict, load_recipe
from inlay.report import Cell
from inlay.train import Progress, train
from inlay.train.groups import rates
from inlay.work import Shared

APART = ("output", "seed", "tensorboard", "keep_last", "checkpoint_every")
"""Fields of a recipe that do not change what is measured."""


@dataclass(frozen=True)
class Task:
    """One cell to train: the row's label, its recipe with the seed, what that comes to, and where it is kept."""

    label: str
    recipe: Recipe
    settings: dict[str, Any]
    file: Path

    @property
    def kind(self) -> str:
        """The catalogue's site of the (first) method; full fine-tuning and the head alone are baselines."""
        first = self.recipe.methods()[0]
        return "baseline" if isinstance(first, Full | LinearProbe) else first.kind

    def stored(self) -> Cell | None:
        """The finished cell, if it was trained before (under whatever label)."""
        if not self.file.exists():
            return None
        return Cell(**{**json.loads(self.file.read_text(encoding="utf-8")), "method": self.label})


def tasks(recipe: CompareRecipe, fingerprint: str) -> list[Task]:
    """Every cell of a comparison on data of that fingerprint, seed by seed, so that whole tables exist early."""
    folder, rows = Path(recipe.output), recipe.rows()
    turns = range(max(len(row.seeds) for row in rows))
    return [task(row, row.seeds[t], folder, fingerprint) for t in turns for row in rows if t < len(row.seeds)]


def task(row: Row, seed: int, folder: Path, fingerprint: str) -> Task:
    """One cell; its file is named by a digest of all that produces it."""
    import inlay

    settings = settings_of(row.recipe)
    made_of = {"settings": deciding(settings), "seed": seed, "data": fingerprint, "library": inlay.__version__}
    digest = sha256(canonical(made_of))[:16]
    recipe = load_recipe(as_dict(row.recipe), Recipe, {"seed": seed, "output": str(folder / "runs" / digest)})
    return Task(row.label, recipe, settings, folder / "cells" / f"{digest}.json")


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Everything that produces a cell but the seed, with what the recipe leaves to the methods spelled out."""
    plain = {name: value for name, value in as_dict(recipe).items() if name not in APART}
    methods, (rate, head_rate) = recipe.methods(), rates(recipe)
    where = [sorted(map(str, p.where or recipe.where or p.method.where)) for p in recipe.placements()]
    return plain | {
        "method": one([m.specification() for m in methods]), "where": one(where),
        "learning_rate": rate, "head_learning_rate": head_rate,
    }  # fmt: skip


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the recipe's fields at their defaults: a field that is new must not make old cells new ones."""
    defaults = {name: field.default for name, field in options(Recipe).items()}
    return {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}


def one(items: list[Any]) -> Any:
    """A list of one item as that item."""
    return items[0] if len(items) == 1 else items


def measure(task: Task, progress: Progress, shared: Shared) -> Cell:
    """Train a cell (or go on with it) and keep it; a run that fails is a cell that says why, and is not kept."""
    from inlay.core.active import detach

    try:
        trained = train(task.recipe, progress, shared)
    except Exception as error:
        kind = "" if isinstance(error, InlayError) else f"{type(error).__name__}: "  # ours are whole sentences
        return failed(task, kind + " ".join(str(error).split()))
    try:
        cell = Cell(
            method=task.label, kind=task.kind, seed=task.recipe.seed, settings=task.settings, error=None,
            metrics=trained.metrics, adapter_parameters=trained.adapter_parameters,
            head_parameters=trained.head_parameters, base_parameters=trained.adapter.base_parameters,
            file_bytes=trained.file_bytes, train_seconds=trained.seconds,
            peak_memory_bytes=trained.peak_memory_bytes, saved_for_backward_bytes=trained.saved_for_backward_bytes,
            curve=trained.curve, cache=trained.cache,
        )  # fmt: skip
    finally:
        detach(trained.adapter.model)
    write_text(task.file, json.dumps(asdict(cell), ensure_ascii=False))
    return cell


def failed(task: Task, why: str) -> Cell:
    """A row that says why it has no numbers."""
    return Cell(
        method=task.label, kind=task.kind, seed=task.recipe.seed, settings=task.settings, error=why, metrics={},
        adapter_parameters=0, head_parameters=0, base_parameters=0, file_bytes=0, train_seconds=0.0,
        peak_memory_bytes=0, saved_for_backward_bytes=0,
    )  # fmt: skip
