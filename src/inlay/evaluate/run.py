"""Evaluating a saved adapter, or a plain model, on a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.core.adapter import Adapter
from inlay.core.checkpoint import load, read
from inlay.core.errors import CheckpointError, OptionError
from inlay.data import Data, Prepared
from inlay.evaluate.generation import exact_match
from inlay.evaluate.predict import Whole, measure
from inlay.models import Opened
from inlay.work import Work, device_of


@dataclass(frozen=True)
class Adapted:
    """A base model with a saved adapter on it, and what the adapter says about its training."""

    opened: Opened
    adapter: Adapter | None
    about: dict[str, Any]


def open_adapter(folder: str | Path, base: str | None = None) -> tuple[Opened, Adapter]:
    """The base model an adapter folder names (or `base` in its stead) with the adapter on it, in evaluation mode.

    Raises:
        CheckpointError: a damaged folder, an adapter that does not name its model, or another base.
    """
    found = adapted(folder, base)
    assert found.adapter is not None
    return found.opened, found.adapter


def adapted(folder: str | Path, base: str | None = None) -> Adapted:
    """`open_adapter`, with the adapter's own description of its training."""
    import inlay.models

    document, _ = read(folder)
    about = document["about"]
    name = base or about.get("model") or document["base"]["name"]
    if not name:
        raise CheckpointError(f"{folder} does not say which model it was trained on: name it (base)")
    recipe = about.get("recipe", {})
    opened = inlay.models.open(
        name, about.get("task"), labels=about.get("labels"), quantize=recipe.get("quantize"),
        dtype="bfloat16" if recipe.get("precision") == "bfloat16" else "float32",
    )  # fmt: skip
    adapter = load(opened.model, folder)
    opened.model.eval()
    return Adapted(opened, adapter, about)


def evaluate(
    model: str | Path | Opened,
    data: str | Data | None = None,
    split: str = "test",
    *,
    limit: int | None = None,
    batch: int = 128,
    generate: bool = False,
    max_new_tokens: int = 256,
    base: str | None = None,
    device: str = "auto",
) -> dict[str, float]:
    """Metrics on a split.

    Args:
        model: folder of a saved adapter (which names its base, task, labels, template and data), or an opened model
            with whatever is attached to it.
        data: a data set by name or as `inlay.data.load` gives it; the one trained on when omitted.
        limit: rows to keep, drawn in proportion to the classes.
        batch: rows per forward pass.
        generate: language models only: answer the prompts greedily and add `exact_match`, the share of answers that
            are right (their last number, where rows carry a `final` one, else the whole text).
        max_new_tokens: length of generated answers.
        base: another base than the one the adapter names.

    Returns:
        Classification: accuracy, macro_f1, mcc. Regression: pearson, spearman, mse. Language models: loss per answer
        token, perplexity, token_accuracy.

    Raises:
        OptionError: no data set, or labels that are not those of the adapter.  CheckpointError: see `open_adapter`.
    """
    import inlay.data

    found = Adapted(model, None, {}) if isinstance(model, Opened) else adapted(model, base)
    about, recipe = found.about, found.about.get("recipe", {})
    if data is None:
        data = about.get("data", {}).get("name")
        if data is None:
            raise OptionError("evaluate needs a data set: the adapter does not name one")
    if isinstance(data, str):
        same = data == about.get("data", {}).get("name")
        limits = limit if limit is not None else recipe.get("limit") if same else None
        columns = recipe.get("columns") if same else None
        data = inlay.data.load(data, columns, about.get("task") if not same else recipe.get("task"), limits)
    if about.get("labels") and data.labels is not None and data.labels != about["labels"]:
        raise OptionError(f"the adapter's labels are {about['labels']}, those of {data.name} are {data.labels}")
    prepared: Prepared = inlay.data.prepare(
        data,
        found.opened.processor,
        about.get("max_length"),
        about.get("image_size"),
        about.get("template") if data.task == "causal-lm" else None,
    )
    place = device_of(device)
    found.opened.model.to(place)
    work = Work(found.opened, data, prepared, place, recipe.get("precision", "float32"))
    metrics = measure(Whole(work), work, split, batch)
    if generate:
        metrics["exact_match"] = exact_match(work, split, batch, max_new_tokens)
    return metrics
