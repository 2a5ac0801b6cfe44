"""The main job: train every cell of a comparison and write the report."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path
from typing import Any

from inlay.compare.grid import tasks
from inlay.compare.pool import cores, run
from inlay.compare.show import Board
from inlay.compare.zeroshot import zero_shot
from inlay.core.files import write_text
from inlay.evaluate.metrics import LOWER_IS_BETTER, NAMES, PRIMARY
from inlay.evaluate.predict import measure, whole
from inlay.methods import Full
from inlay.recipe import CompareRecipe, as_dict
from inlay.report import Cell, Result, markdown, write_csv, write_html, write_json, write_svg
from inlay.report.numbers import title
from inlay.train.state import make
from inlay.work import open_work


def compare(recipe: CompareRecipe, board: Board | None = None) -> Result:
    """Train what is not trained yet and write `report.html`, `results.csv`, `results.json`, `table.md`, `quality.svg`.

    Cells finished by an earlier call with the same settings are read, not trained; a cell that was interrupted goes on
    from its last checkpoint; one that fails is a row that says why.
    """
    board = board or Board()
    make(Path(recipe.output))
    first = recipe.rows()[0].recipe
    opened = open_work(first)  # fetches what is missing before workers start, and names task and metrics
    grid = tasks(recipe, opened.data.fingerprint)
    cells: dict[int, Cell] = {n: cell for n, task in enumerate(grid) if (cell := task.stored()) is not None}
    todo = [n for n in range(len(grid)) if n not in cells]
    workers = recipe.workers or (1 if opened.device.type == "cuda" else cores())

    def tell(kind: str, number: int, particulars: Any) -> None:
        board.tell(kind, grid[todo[number]], particulars)
        if kind == "cell":
            cells[todo[number]] = particulars

    with board.showing(len(grid), len(cells)):
        run([grid[n] for n in todo], workers, tell)
    result = collect(recipe, [cells[n] for n in sorted(cells)], opened, min(workers, max(1, len(todo))))
    write(result, Path(recipe.output))
    return result


def collect(recipe: CompareRecipe, cells: list[Cell], opened: Any, workers: int) -> Result:
    """Cells and all that a reader needs beside them."""
    primary = recipe.metric or PRIMARY[opened.task]
    names = [primary, *(name for name in NAMES[opened.task] if name != primary)]
    notes = [
        f"{opened.data.name}: " + ", ".join(f"{len(rows):,} {split}" for split, rows in opened.prepared.splits.items())
        + " rows. " + opened.data.note,
        f"{workers} cell{'s were' if workers > 1 else ' was'} trained at a time on {cores()} cores; seconds are of "
        "training steps alone, without evaluation and files.",
        "Peak memory: the most bytes of tensors alive at any moment of a training step on the longest batch. Saved for "
        "backward: what autograd keeps of that step's forward, parameters not counted.",
    ]  # fmt: skip
    rows = recipe.rows()
    cells = [*zero_shot(rows, opened), *cells]
    if not opened.opened.head and opened.prepared.prompt is None:  # nothing is fresh: the base does the task already
        found = measure(whole(opened), opened, "test", recipe.evaluate_batch)
        notes.append("The base without an adapter: " + ", ".join(f"{title(k)} {v:.3f}" for k, v in found.items()) + ".")
    notes += [opened.opened.note] if opened.opened.note else []
    kept = {cell.method: cell.cache["kept"] for cell in cells if "kept" in cell.cache}
    if kept:
        told = "; ".join(
            f"{what} ({', '.join(m for m in kept if kept[m] == what)})" for what in dict.fromkeys(kept.values())
        )
        notes.append(f"Computed once per row, so their seconds hold one pass through what lies below: {told}.")
    full = next((row.label for row in rows if isinstance(row.recipe.methods()[0], Full)), None)
    return Result(
        title=recipe.title or f"{len(rows)} methods on {opened.data.name}",
        model=opened.opened.name, data=opened.data.name, metric=primary, metrics=names, cells=cells,
        lower_is_better=[name for name in names if name in LOWER_IS_BETTER], machine=machine(), notes=notes,
        recipe=as_dict(recipe), baseline=full,
    )  # fmt: skip


def write(result: Result, folder: Path) -> None:
    """Every form of the result, each file whole or not at all."""
    write_json(result, folder / "results.json")
    write_csv(result, folder / "results.csv")
    write_text(folder / "table.md", markdown(result) + "\n")
    write_html(result, folder / "report.html")
    if any(cell.error is None for cell in result.cells):
        write_svg(result, folder / "quality.svg")


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch
    import transformers

    import inlay

    return {
        "cpu": cpu(), "cores": cores(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__, "transformers": transformers.__version__, "inlay": inlay.__version__,
        "date": date.today().isoformat(),
    }  # fmt: skip


def cpu() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
