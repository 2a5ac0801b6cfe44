"""Progress of a comparison: one bar for the grid, one for each cell in training, one line for each that is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from inlay.compare.grid import Task
from inlay.report import Cell


class Board:
    """Shows the grid on the terminal (standard error)."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), console=self.console,
        )  # fmt: skip
        self.running: dict[str, Any] = {}

    @contextmanager
    def showing(self, total: int, done: int) -> Iterator[None]:
        """The bars, for as long as the context lasts."""
        self.whole = self.bars.add_task("cells", total=total, completed=done, facts="")
        if done:
            self.console.print(f"{done} of {total} cells are finished already", highlight=False)
        with self.bars:
            yield

    def tell(self, kind: str, task: Task, particulars: Any) -> None:
        """Something happened to a cell."""
        name = f"{task.label}, seed {task.recipe.seed}"
        if kind == "start":
            total, done = particulars
            self.running[name] = self.bars.add_task(f"  {name}", total=total, completed=done, facts="")
        elif kind == "step" and name in self.running:
            step, loss = particulars
            self.bars.update(self.running[name], completed=step, facts=f"loss {loss:.3f}")
        elif kind == "cell":
            if name in self.running:
                self.bars.remove_task(self.running.pop(name))
            self.bars.advance(self.whole)
            self.bars.console.print(line(name, particulars), highlight=False, markup=False)


def line(name: str, cell: Cell) -> str:
    """A finished cell in one line."""
    if cell.error is not None:
        return f"{name}: failed: {cell.error}"
    metrics = ", ".join(f"{k} {v:.3f}" for k, v in cell.metrics.items() if k != "loss")
    once = f" · {cell.cache['kept']} computed once" if "kept" in cell.cache else ""
    return f"{name}: {metrics} · {cell.adapter_parameters:,} parameters · {cell.train_seconds:.1f} s{once}"
