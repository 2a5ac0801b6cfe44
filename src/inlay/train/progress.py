"""What a run tells about itself while it goes on, and how a terminal shows it."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Any

import torch


class Progress(ABC):
    """Told about a run as it goes on; `Silent` drops it all, `Bar` shows it in a terminal."""

    @abstractmethod
    def start(self, label: str, total: int, done: int) -> None:
        """Training is about to take steps `done` + 1 to `total`."""

    @abstractmethod
    def step(self, step: int, loss: float, rate: float) -> None:
        """An optimiser step was taken, at the mean loss of its rows and the largest learning rate."""

    @abstractmethod
    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The validation rows were evaluated."""

    @abstractmethod
    def say(self, text: str) -> None:
        """A sentence for the user."""

    @abstractmethod
    def close(self) -> None:
        """The run has ended, well or not."""


class Silent(Progress):
    """Says nothing."""

    def start(self, label: str, total: int, done: int) -> None:
        return

    def step(self, step: int, loss: float, rate: float) -> None:
        return

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        return

    def say(self, text: str) -> None:
        return

    def close(self) -> None:
        return


class Bar(Progress):
    """A progress bar with loss, validation metric, learning rate, memory and time left; `metric` is the one shown."""

    def __init__(self, metric: str | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        self.metric, self.last, self.task = metric, "", None
        self.bar: Any = Rich(
            TextColumn("{task.description}"), BarColumn(bar_width=10), MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"), TimeRemainingColumn(compact=True), console=Console(stderr=True),
        )  # fmt: skip

    def start(self, label: str, total: int, done: int) -> None:
        self.bar.start()
        self.task = self.bar.add_task(label, total=total, completed=done, facts="")

    def step(self, step: int, loss: float, rate: float) -> None:
        facts = f"loss {loss:.3f}{self.last} rate {rate:.0e} {megabytes()}"
        self.bar.update(self.task, completed=step, facts=facts)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        name = self.metric if self.metric in metrics else next(iter(metrics))
        self.last = f" {name} {metrics[name]:.3f}"

    def say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False)

    def close(self) -> None:
        self.bar.stop()


def megabytes() -> str:
    """Memory in use: the GPU's where there is one, else the largest this process has held."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e6:.0f} MB"
    if sys.platform == "win32":
        return ""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6:.0f} MB"
