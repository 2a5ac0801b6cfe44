"""What a comparison measured, as plain data: the only input of every table, plot and file of this package."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inlay.core.errors import InlayError, near


class ReportError(InlayError, ValueError):
    """A result from which no report can be made, or a file that holds no result."""


def plain(value: Any, where: str = "value") -> Any:
    """`value` as JSON's own types: tuples and sets become lists, paths strings, numpy and torch scalars numbers.

    Raises ReportError, naming the place, for anything that has no such form.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return [plain(item, where) for item in sorted(value, key=str)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    item = getattr(value, "item", None)  # numpy and torch scalars
    if callable(item) and getattr(value, "ndim", None) == 0:
        return plain(item(), where)
    raise ReportError(f"{where} is a {type(value).__name__}, which a report cannot hold; give it as plain JSON data")


def number(value: Any) -> float | None:
    """A finite number, or None for what was not measured (None, NaN, infinity)."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class Cell:
    """One finished, or failed, run: one method with one seed.

    `None` and NaN stand for "not measured" wherever a number is expected. All fields are made plain JSON data on
    construction (a tuple becomes a list), so that a result read back from its file equals the one written.
    """

    method: str  # display label, unique per settings: "LoRA r=8"
    kind: str  # the site of the catalogue: "weight", "hidden", "tokens", … or "baseline"
    seed: int
    settings: dict[str, Any]  # everything that produced the run, but the seed
    error: str | None  # why the run failed
    metrics: dict[str, float]  # on the test split; higher is better unless listed in Result.lower_is_better
    adapter_parameters: int
    head_parameters: int
    base_parameters: int
    file_bytes: int
    train_seconds: float
    peak_memory_bytes: int
    saved_for_backward_bytes: int
    curve: list[dict[str, Any]] = field(default_factory=list)  # [{"step": 10, "loss": 1.2, "epoch": 0.1}, …]
    cache: dict[str, Any] = field(default_factory=dict)  # what frozen layers gave and was kept, or why nothing was

    def __post_init__(self) -> None:
        make_plain(self, f"run '{self.method}', seed {self.seed}: ")


@dataclass(frozen=True)
class Result:
    """All runs of one comparison and what a reader needs to judge them. Raises ReportError if `metric` is unknown."""

    title: str
    model: str
    data: str
    metric: str  # the primary one, of `metrics`
    metrics: list[str]
    cells: list[Cell]
    lower_is_better: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)  # cpu, cores, torch, transformers, inlay, date
    notes: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None  # label of the full fine-tuning row, against which seconds are given

    def __post_init__(self) -> None:
        for name in (self.metric, *self.lower_is_better):
            if name not in self.metrics:
                known = ", ".join(self.metrics) or "none"
                raise ReportError(f"unknown metric '{name}'; this result has: {known}{near(name, self.metrics)}")
        make_plain(self, "")

    def check(self) -> None:
        """ReportError if there is no run, or if runs under one label cannot be rows of one table."""
        if not self.cells:
            raise ReportError("the result holds no runs, so there is nothing to report; run the comparison first")
        first: dict[str, Cell] = {}
        seen: set[tuple[str, int]] = set()
        for cell in self.cells:
            if (cell.method, cell.seed) in seen:
                raise ReportError(f"'{cell.method}' with seed {cell.seed} occurs twice; give each run once")
            seen.add((cell.method, cell.seed))
            other = first.setdefault(cell.method, cell)
            if other.kind != cell.kind:
                raise ReportError(f"'{cell.method}' is of kind '{other.kind}' and '{cell.kind}'; one label, one kind")
            if different := differences(other.settings, cell.settings):
                raise ReportError(
                    f"runs labelled '{cell.method}' differ in {', '.join(different)}, so their mean would mix two "
                    "settings; give each setting its own label"
                )


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The settings in which two runs differ, the seed apart."""
    return [key for key in sorted({*a, *b} - {"seed"}) if key not in a or key not in b or a[key] != b[key]]


def make_plain(record: Any, where: str) -> None:
    """Turn the fields of a frozen record into plain data, in place; a Result's cells already are."""
    for name, value in vars(record).items():
        object.__setattr__(record, name, list(value) if name == "cells" else plain(value, where + name))
