"""`inlay plan`: what adapters will cost, before anything is downloaded or trained."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from inlay.cli.arguments import Command, add_set, as_json, positive
from inlay.cli.flags import add_fields, recipe_fields
from inlay.cli.show import Render, facts, human, listing, show, size
from inlay.core.errors import InlayError, OptionError
from inlay.recipe import Recipe, Row, load_recipe, rows_at

FIELDS = (
    "method", "where", "exclude", "layers", "overrides", "head", "batch", "max_length", "image_size",
    "quantize", "quantize_group", "loftq", "gradient_checkpointing", "prompt",
)  # fmt: skip
"""Recipe fields that a cost depends on."""


def register(command: Command) -> None:
    p = command("plan", plan, "parameters, bytes and memory before anything is downloaded or trained")
    p.add_argument("recipe", nargs="?", help="recipe to plan, of `train` or `compare`; flags replace its fields")
    p.add_argument("--arch", help="architecture by name (roberta-base, llama-7b, …) or a model folder")
    add_set(p)
    p.add_argument(
        "--labels", type=positive, help="classes of the task head (default: those of the data if here, or 2)"
    )
    p.add_argument("--length", type=positive, help="tokens per row, or side of images (default: the recipe's, or 128)")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="type of the base (default float32)")
    p.add_argument("--no-memory", action="store_true", help="counts alone")
    add_fields(p, Recipe, FIELDS)
    as_json(p)


def plan(args: argparse.Namespace) -> None:
    given = recipe_fields(args, Recipe)
    if args.recipe:
        rows = rows_at(args.recipe, given)
    else:
        if not args.arch or "method" not in given:
            raise OptionError("plan needs a recipe, or --arch and --method")
        recipe = load_recipe({"model": args.arch, "data": ""}, Recipe, given)
        rows = [Row(recipe.label(), [recipe.seed], recipe)]
    about_data = {"labels": args.labels} if args.labels else classes(rows[0].recipe)
    if len(rows) > 1:
        plans = [tried(row, args, about_data) for row in rows]
        if all("refused" in found for found in plans):
            raise OptionError(plans[0]["refused"])
        show(args, plans, several(plans))
    else:
        found = planned(rows[0].recipe, args, about_data)
        show(args, {"label": rows[0].label, **found}, facts(found))


def tried(row: Row, args: argparse.Namespace, about_data: dict[str, Any]) -> dict[str, Any]:
    """The plan of one row of several; one that has no place in the model says why, as its row of a comparison does."""
    try:
        return {"label": row.label, **planned(row.recipe, args, about_data)}
    except InlayError as error:
        return {"label": row.label, "refused": " ".join(str(error).split())}


def planned(recipe: Recipe, args: argparse.Namespace, about_data: dict[str, Any]) -> dict[str, Any]:
    """The plan of one row as plain data."""
    import torch

    from inlay.core.contexts import Template, told
    from inlay.models.opening import BY_WORDS
    from inlay.plan import plan as predict

    placements = recipe.placements()
    if recipe.prompt is not None:
        about_data = about_data | {"task": BY_WORDS}
        placements = [told(placement, Template.guess(recipe.prompt)) for placement in placements]
    dtype = args.dtype or ("bfloat16" if recipe.precision == "bfloat16" else "float32")
    found = predict(
        args.arch or recipe.model, placements, recipe.where, layers=recipe.layers, exclude=recipe.exclude,
        overrides=recipe.overrides, head=recipe.head, batch=recipe.batch,
        length=args.length or recipe.max_length or recipe.image_size, dtype=getattr(torch, dtype),
        quantize=recipe.quantize, quantize_group=recipe.quantize_group, loftq=recipe.loftq,
        gradient_checkpointing=recipe.gradient_checkpointing, memory=not args.no_memory, **about_data,
    )  # fmt: skip
    return replace(found, method=recipe.label()).as_dict()


def classes(recipe: Recipe) -> dict[str, Any]:
    """Task and number of classes of a recipe's data, where they are on this machine; nothing is downloaded."""
    from inlay import data as library

    here = {entry.name for entry in library.names() if entry.fetched}
    if not recipe.data or (recipe.data not in here and not Path(recipe.data).exists()):
        return {}
    loaded = library.load(recipe.data, recipe.columns, recipe.task, recipe.limit)
    return {"task": loaded.task} | ({"labels": len(loaded.labels)} if loaded.labels else {})


def several(plans: list[dict[str, Any]]) -> Render:
    """A row per method."""
    columns = ["method", "adapter", "head", "share", "file", "peak memory"]
    lines = [
        [p["label"], human("", p["adapter_parameters"]), human("", p["head_parameters"]), f"{p['share']:.3g} %",
         size(p["file_bytes"]), human("peak_bytes", p["peak_training_bytes"])]
        if "refused" not in p else [p["label"], f"refused: {p['refused']}", "", "", "", ""]
        for p in plans
    ]  # fmt: skip
    return listing(columns, lines, right=tuple(columns[1:]))
