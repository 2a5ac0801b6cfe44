"""Axes of the static plot: from values to pixels, with round ticks; zero has its own place beside a logarithm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from inlay.report.aggregate import COSTS
from inlay.report.numbers import time_unit

ZERO_SLOT = 40.0  # pixels between the tick of zero and the start of the logarithmic part


def linear_ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 × 10ⁿ within the range, about `wanted` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit >= raw * 0.75)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the range; 2 and 5 times them as well where it spans few."""
    few = math.log10(high / low) < 2.5
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [unit * 10.0**power for power in powers for unit in ((1, 2, 5) if few else (1,))]
    return [value for value in values if low * 0.999 <= value <= high * 1.001]


@dataclass(frozen=True)
class Axis:
    """Maps `low` … `high` to pixels `start` … `end`; `zero` is the pixel of 0 where a logarithmic axis needs one."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    zero: float | None = None
    unit: float = 1.0  # ticks are round multiples of it

    def place(self, value: float) -> float:
        if self.log and value <= 0:
            return self.start if self.zero is None else self.zero
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            drawn = log_ticks(self.low, self.high)
        else:
            drawn = [value * self.unit for value in linear_ticks(self.low / self.unit, self.high / self.unit)]
        return drawn if self.zero is None else [0.0, *drawn]


def cost_axis(name: str, values: Iterable[float], start: float, end: float) -> Axis:
    """An axis over a cost of `COSTS`: from zero if linear, a little beyond the data on both sides if logarithmic."""
    known = list(values)
    positive = [value for value in known if value > 0]
    if COSTS[name].log and positive:
        zero = None if len(positive) == len(known) else start + 12
        low, high = min(positive), max(positive)
        pad = max((high / low) ** 0.06, 1.25)
        return Axis(low / pad, high * pad, start if zero is None else start + ZERO_SLOT, end, True, zero)
    top = max(known, default=0.0) * 1.06 or 1.0
    return Axis(0.0, top, start, end, unit=time_unit(top)[0] if COSTS[name].unit == "seconds" else 1.0)


def quality_axis(values: Iterable[float], start: float, end: float, factor: float) -> Axis:
    """A linear axis, shown × `factor`, over the means and their bars; not from zero, as differences are the matter."""
    known = list(values) or [0.0, 1.0]
    low, high = min(known), max(known)
    pad = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return Axis(low - pad, high + pad, start, end, unit=1 / factor)
