"""Colour and shape of each kind of method: told apart by either alone, so that colour vision does not matter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """Colours on a light and a dark ground, and an SVG path of about unit radius."""

    light: str
    dark: str
    path: str


CIRCLE = "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0 -1 0Z"
SQUARE = "M-.9 -.9H.9V.9H-.9Z"
TRIANGLE = "M0 -1.2L1.14 .8H-1.14Z"
DIAMOND = "M0 -1.26L1.26 0L0 1.26L-1.26 0Z"
WEDGE = "M0 1.2L1.14 -.8H-1.14Z"
HEXAGON = "M1.08 0L.54 .94H-.54L-1.08 0L-.54 -.94H.54Z"
BAR = "M-1.3 -.5H1.3V.5H-1.3Z"
CROSS = "M-.4 -1.2H.4V-.4H1.2V.4H.4V1.2H-.4V.4H-1.2V-.4H-.4Z"

MARKS = {
    "weight": Mark("#0f62a8", "#64b1f0", CIRCLE),
    "hidden": Mark("#cf4f12", "#f5915a", SQUARE),
    "tokens": Mark("#00826a", "#3ecaa6", TRIANGLE),
    "input": Mark("#2b93c9", "#93d1f5", DIAMOND),
    "gradient": Mark("#a8478a", "#e493c6", WEDGE),
    "schedule": Mark("#a87400", "#e8bb50", HEXAGON),
    "output": Mark("#6b6320", "#c3bd6e", BAR),
    "baseline": Mark("#5d6673", "#a3adba", CROSS),
}
SPARE = [
    Mark("#7a4fc2", "#b79af0", DIAMOND),
    Mark("#8a3b3b", "#e09a9a", WEDGE),
    Mark("#3f6f3a", "#94c78e", HEXAGON),
    Mark("#475569", "#94a3b8", BAR),
]


def marks(kinds: Iterable[str]) -> dict[str, Mark]:
    """The mark of each kind, in the catalogue's order; kinds that the catalogue lacks take spare ones in turn."""
    present = list(dict.fromkeys(kinds))
    known = {kind: mark for kind, mark in MARKS.items() if kind in present}
    other = [kind for kind in present if kind not in MARKS]
    return known | {kind: SPARE[index % len(SPARE)] for index, kind in enumerate(other)}


def stylesheet(found: dict[str, Mark], prefix: str) -> str:
    """CSS rules `.{prefix}0 {color: …}` in the order of `found`, for light and dark grounds."""
    light = "".join(f".{prefix}{index}{{color:{mark.light}}}" for index, mark in enumerate(found.values()))
    dark = "".join(f".{prefix}{index}{{color:{mark.dark}}}" for index, mark in enumerate(found.values()))
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"
