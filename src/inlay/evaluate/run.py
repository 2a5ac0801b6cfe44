"""Evaluating a saved adapter, or a plain model, on a data set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inlay.core.adapter import Adapter
from inlay.core.checkpoint import load, read
from inlay.core.contexts import ContextMethod
from inlay.core.errors import CheckpointError, OptionError
from inlay.data import Data, Prepared
from inlay.evaluate.generation import exact_match
from inlay.evaluate.predict import measure, whole
from inlay.models import Opened
from inlay.models.loftq import loftq_base
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


def adapted(folder: str | Path, base: str | None = None, any_base: bool = False) -> Adapted:
    """`open_adapter`, with the adapter's own description of its training; `any_base` as for `inlay.load`."""
    import inlay.models

    document, _ = read(folder)
    about = document["about"]
    name = base or about.get("model") or document["base"]["name"]
    if not name:
        raise CheckpointError(f"{folder} does not say which model it was trained on: name it (base)")
    recipe = about.get("recipe", {})
    given = "loftq" in document["base"]  # it is quantised for the adapter
    opened = inlay.models.open(
        name, about.get("task"), labels=about.get("labels"), quantize=None if given else recipe.get("quantize"),
        quantize_group=None if given else recipe.get("quantize_group"), prompt=recipe.get("prompt"),
        dtype="bfloat16" if recipe.get("precision") == "bfloat16" else "float32",
    )  # fmt: skip
    loftq_base(opened.model, folder)
    adapter = load(opened.model, folder, any_base=any_base)
    opened.model.eval()
    return Adapted(opened, adapter, about)


def evaluate(
    model: str | Path | Opened,
    data: str | Data | None = None,
    split: str = "test",
    *,
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    batch: int = 128,
    generate: bool = False,
    max_new_tokens: int = 256,
    base: str | None = None,
    any_base: bool = False,
    device: str = "auto",
    prompt: str | None = None,
) -> dict[str, float]:
    """Metrics on a split.

    Args:
        model: folder of a saved adapter (which names its base, task, labels, template and data), or an opened model
            with whatever is attached to it.
        data: a data set by name or as `inlay.data.load` gives it; the one trained on when omitted. Of another single
            file all rows are used.
        columns: canonical field to column name, where the data's own names do not tell.
        limit: rows to keep, drawn in proportion to the classes.
        batch: rows per forward pass.
        generate: language models only: answer the prompts greedily and add `exact_match`, the share of answers that
            are right (their last number, where rows carry a `final` one, else the whole text).
        max_new_tokens: length of generated answers.
        base: another base than the one the adapter names.
        any_base: accept one whose adapted weights are not those of training.
        prompt: the class prompt of an opened dual encoder; an adapter's own otherwise.

    Returns:
        Classification: accuracy, macro_f1, mcc. Regression: pearson, spearman, mse. Language models: loss per answer
        token, perplexity, token_accuracy.

    Raises:
        OptionError: no data set, or labels that are not those of the adapter.  CheckpointError: see `open_adapter`.
    """
    import inlay.data

    found = Adapted(model, None, {}) if isinstance(model, Opened) else adapted(model, base, any_base)
    about, recipe = found.about, found.about.get("recipe", {})
    if data is None:
        data = about.get("data", {}).get("name")
        if data is None:
            raise OptionError("evaluate needs a data set: the adapter does not name one")
    if isinstance(data, str):
        known = {entry.name for entry in inlay.data.names()}
        same = data == about.get("data", {}).get("name")
        limits = limit if limit is not None else recipe.get("limit") if same else None
        columns = columns or (recipe.get("columns") if same else None)
        asked = recipe.get("task") if same else None if data in known else about.get("task")
        data = inlay.data.load(data, columns, asked, limits, complete=same)
        if list(data.splits) == ["train"]:  # a file of its own: all its rows are what is asked about
            split = "train"
    task = about.get("task")
    if task and data.task != task:
        raise OptionError(f"the adapter was trained for {task}, and {data.name} is for {data.task}")
    if about.get("labels") and data.labels is not None and not open_to(found.adapter, data.labels, about["labels"]):
        data = with_labels(data, about["labels"])
    prepared: Prepared = inlay.data.prepare(
        data,
        found.opened.processor,
        about.get("max_length"),
        about.get("image_size"),
        about.get("template") if data.task == "causal-lm" else None,
        prompt=prompt or recipe.get("prompt"),
    )
    place = device_of(device)
    found.opened.model.to(place)
    work = Work(found.opened, data, prepared, place, recipe.get("precision", "float32"))
    metrics = measure(whole(work), work, split, batch)
    if generate:
        metrics["exact_match"] = exact_match(work, split, batch, max_new_tokens)
    return metrics


def open_to(adapter: Adapter | None, labels: list[str], known: list[str]) -> bool:
    """Whether an adapter classifies other classes than it was trained on: by their names, none having its own part."""
    methods = [level.method for level in adapter.levels] if adapter is not None else []
    contexts = [method for method in methods if isinstance(method, ContextMethod)]
    return bool(contexts) and not set(labels) <= set(known) and all(m.for_any_class() for m in contexts)


def with_labels(data: Data, labels: list[str]) -> Data:
    """The data set with its classes numbered as in `labels`, which may have more; OptionError where it lacks some."""
    assert data.labels is not None
    if data.labels == labels:
        return data
    if not set(data.labels) <= set(labels):
        raise OptionError(f"the adapter's labels are {labels}, those of {data.name} are {data.labels}")
    numbers = [labels.index(name) for name in data.labels]
    return replace(data, labels=labels, splits={s: rows.relabelled(numbers) for s, rows in data.splits.items()})
