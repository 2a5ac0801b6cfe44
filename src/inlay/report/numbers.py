"""Numbers as people read them: 294.9K, 1.2 MB, 0.35×, 91.2 ± 0.4."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from inlay.report.aggregate import COSTS, Row
from inlay.report.result import Result, number

MISSING = "–"


def scaled(value: float, units: tuple[str, ...], space: str) -> str:
    """`value` in thousands: one decimal, and the next unit rather than 1000.0 of this one."""
    power = 0
    while power < len(units) - 1 and round(value, 1 if power else 0) >= 1000:
        value, power = value / 1000, power + 1
    return f"{value:.1f}{space}{units[power]}" if power else f"{value:.0f}{space}{units[0]}".rstrip()


def count(value: float | None) -> str:
    """768, 294.9K, 124.6M, 6.7B."""
    return MISSING if value is None else scaled(value, ("", "K", "M", "B", "T"), "")


def size(value: float | None) -> str:
    """Bytes in decimal units: 512 B, 1.2 MB."""
    return MISSING if value is None else scaled(value, ("B", "kB", "MB", "GB", "TB"), " ")


def seconds(value: float | None) -> str:
    """0.42 s, 8.1 s, 42 s, 2 min 05 s, 1 h 12 min."""
    if value is None:
        return MISSING
    if value < 59.5:
        return f"{value:.{0 if value >= 9.95 else 1 if value >= 0.995 else 2}f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{round(value / 60) // 60} h {round(value / 60) % 60:02d} min"


def ratio(value: float | None) -> str:
    """0.35×, 1.00×, 12×."""
    return MISSING if value is None else f"{value:.{0 if value >= 9.995 else 2}f}×"


def percent(value: float | None) -> str:
    """Two significant digits below one: 0.0012 %, 0.24 %, 1.3 %, 100 %."""
    if value is None:
        return MISSING
    if value == 0:
        return "0 %"
    if value >= 0.995:
        return f"{value:.{0 if value >= 9.95 else 1}f} %"
    return f"{value:.{1 - math.floor(math.log10(value))}f} %"


UNITS = {"count": count, "bytes": size, "seconds": seconds}


@dataclass(frozen=True)
class Scale:
    """How one metric is shown: multiplied by `factor`, with `decimals` places."""

    factor: int
    decimals: int

    def show(self, value: float | None) -> str:
        return MISSING if value is None else f"{value * self.factor:.{self.decimals}f}"

    def spread(self, value: dict[str, Any]) -> str:
        """`91.2 ± 0.4`, or only the mean for one seed."""
        deviation = value["deviation"]
        return self.show(value["mean"]) + ("" if deviation is None else f" ± {self.show(deviation)}")


def scale(values: Iterable[Any], lower_is_better: bool) -> Scale:
    """Metrics within −1 … 1 where higher is better (accuracy, F1, correlations) are shown ×100; others as they are."""
    known = [abs(value) for value in map(number, values) if value is not None]
    top = max(known, default=0.0)
    if known and top <= 1 and not lower_is_better:
        return Scale(100, 1)
    return Scale(1, 1 if top >= 100 else 2 if top >= 10 else 3)


def scales(result: Result, table: Iterable[Row]) -> dict[str, Scale]:
    """The scale of every metric and of "average", from all finished runs."""
    runs = [cell.metrics for cell in result.cells if cell.error is None]
    found = {name: scale((run.get(name) for run in runs), name in result.lower_is_better) for name in result.metrics}
    means = [row["average"]["mean"] for row in table]
    return found | {"average": scale(means, result.metric in result.lower_is_better)}


def cost(name: str, value: float | None) -> str:
    """A cost of `COSTS` in its unit."""
    return UNITS[COSTS[name].unit](value)


def time_unit(top: float) -> tuple[int, str]:
    """The unit in which an axis up to `top` seconds has round ticks."""
    return (1, "s") if top < 180 else (60, "min") if top < 7200 else (3600, "h")


def tick(name: str, value: float, top: float) -> str:
    """A cost at a tick of an axis that ends at `top`: 2 min rather than 2 min 00 s, 1M rather than 1.0M."""
    if COSTS[name].unit == "seconds":
        unit, word = time_unit(top)
        return f"{value / unit:g} {word}"
    return re.sub(r"\.0(?!\d)", "", cost(name, value))


def title(name: str) -> str:
    """A metric's name as a heading: macro_f1 → macro f1."""
    return name.replace("_", " ")
