"""`inlay train` and `inlay compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from inlay.cli.arguments import Command, add_set, as_json
from inlay.cli.flags import add_fields, recipe_fields
from inlay.cli.show import facts, show
from inlay.core.errors import InlayError
from inlay.recipe import CompareRecipe, Recipe, load_recipe


def register(command: Command) -> None:
    p = command("train", train, "train one adapter; the same command again resumes it")
    p.add_argument("recipe", nargs="?", help="recipe (YAML); flags replace its fields")
    add_set(p)
    add_fields(p, Recipe)
    as_json(p)

    p = command("compare", compare, "many methods on one task: the table, the plots, the report")
    p.add_argument("recipe", nargs="?", help="recipe (YAML); flags replace its fields")
    add_set(p)
    add_fields(p, CompareRecipe)
    as_json(p)


def train(args: argparse.Namespace) -> None:
    from inlay.train import Bar
    from inlay.train import train as run

    recipe = load_recipe(args.recipe, Recipe, recipe_fields(args, Recipe))
    trained = run(recipe, Bar(recipe.metric))
    document = {
        "output": str(trained.folder), "metrics": trained.metrics, "steps": trained.steps, "seconds": trained.seconds,
        "adapter_parameters": trained.adapter_parameters, "head_parameters": trained.head_parameters,
        "file_bytes": trained.file_bytes, "peak_memory_bytes": trained.peak_memory_bytes,
        "cache": trained.cache,
    }  # fmt: skip
    show(args, document, facts(document))


def compare(args: argparse.Namespace) -> None:
    from inlay.compare import compare as run
    from inlay.report import rows, table

    recipe = load_recipe(args.recipe, CompareRecipe, recipe_fields(args, CompareRecipe))
    result = run(recipe)

    def render(console: Console) -> None:
        console.print(table(result, console.width))
        console.print(f"report: {Path(recipe.output) / 'report.html'}", highlight=False, markup=False)

    show(args, rows(result), render)
    if all(cell.error is not None for cell in result.cells):
        raise InlayError("no method could be trained; the table says why")
