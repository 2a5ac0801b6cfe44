"""Every method at its default options on real tasks: `make results`, or this file with the names of some tasks.

Each recipe of `recipes/methods/` is compared (a cell that is trained already is not trained again), its table and its
data go to `results/methods/<task>/`, and one table over all tasks to `results/methods/README.md`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from inlay.compare import compare
from inlay.core.files import write_text
from inlay.recipe import CompareRecipe, load_recipe
from inlay.report import Result, across, markdown, read_json, write_csv, write_json

ROOT = Path(__file__).resolve().parent.parent
RECIPES, RESULTS = ROOT / "recipes" / "methods", ROOT / "results" / "methods"
TASKS = ("trec", "stsb", "cifar10", "grocery", "instructlab")
HEAD = """# Every method, task by task

Made by `make results`; nothing here is written by hand. Every method at its default options: mean ± sample deviation
over the seeds that the task's own table tells (`<task>/table.md`, with all metrics and costs); the recipes are in
`recipes/methods/`. *Rank* is the mean over tasks of a method's rank among those that ran there (0 % is best, 100 %
last). A dash: the method has no place in that model, and the task's own table says why. Parameters, file and memory are
those of the first task.

"""


def main(chosen: list[str]) -> None:
    """Compare what is asked for, then draw the table from everything that has results."""
    for task in chosen or TASKS:
        result = compare(load_recipe(RECIPES / f"{task}.yaml", CompareRecipe))
        bare = replace(result, cells=[replace(cell, curve=[]) for cell in result.cells])  # curves are large
        write_json(bare, RESULTS / task / "results.json")
        write_csv(result, RESULTS / task / "results.csv")
        write_text(RESULTS / task / "table.md", page(result))
    done = [read_json(RESULTS / task / "results.json") for task in TASKS if (RESULTS / task / "results.json").exists()]
    write_text(RESULTS / "README.md", HEAD + across(done))


def page(result: Result) -> str:
    """One task: its table, what it was measured on, and its notes."""
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items() if value is not None)
    notes = "\n".join(f"- {note}" for note in [*result.notes, machine])
    return f"# {result.title}\n\n{markdown(result)}\n{notes}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
