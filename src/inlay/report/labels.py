"""Placement of labels beside points: none overlaps another label, a point or the edge.

Greedy, in rounds: labels choose in turn the cheapest place still free, and those that fared badly choose earlier in the
next round ("squeaky wheel" optimisation, Joslin and Clements, JAIR 10, 1999). The best round is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Segment = tuple[float, float, float, float]  # x1, y1, x2, y2

DIRECTIONS = [(1, 0), (0, -1), (-1, 0), (0, 1), (0.7, -0.7), (0.7, 0.7), (-0.7, -0.7), (-0.7, 0.7)]  # best first
BETWEEN = [(0.4, -0.9), (0.4, 0.9), (-0.4, -0.9), (-0.4, 0.9), (0.9, -0.4), (0.9, 0.4), (-0.9, -0.4), (-0.9, 0.4)]
RINGS = (0.0, 12.0, 22.0, 34.0, 48.0, 64.0, 84.0, 110.0)  # pixels beyond the mark; but for the first, with a leader
ROUNDS = 12
HIDDEN = 100.0  # the price of a label that finds no place


@dataclass(frozen=True)
class Label:
    """Where a text goes: its box, the side that must not move if the text is narrower or wider than was estimated
    ("start", "middle" or "end", as SVG says), and the leader to its point if it stands apart from it."""

    box: Box
    anchor: str
    leader: Segment | None

    @property
    def x(self) -> float:
        """The position of the anchor."""
        return {"start": self.box[0], "middle": (self.box[0] + self.box[2]) / 2, "end": self.box[2]}[self.anchor]


def text_width(text: str, font: float) -> float:
    """A generous estimate for a proportional sans-serif face, in pixels."""
    narrow, wide = "iljtfrI.,:;'|!()[] ", "mwMW@%&"
    return font * sum(0.36 if letter in narrow else 0.95 if letter in wide else 0.64 for letter in text)


def overlaps(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def grown(box: Box, by: float) -> Box:
    return (box[0] - by, box[1] - by, box[2] + by, box[3] + by)


def crosses(segment: Segment, box: Box) -> bool:
    """Does a segment pass through a box? (Liang and Barsky's clipping.)"""
    x1, y1, x2, y2 = segment
    enter, leave = 0.0, 1.0
    for start, delta, low, high in ((x1, x2 - x1, box[0], box[2]), (y1, y2 - y1, box[1], box[3])):
        if delta == 0:
            if not low < start < high:
                return False
            continue
        near, far = sorted(((low - start) / delta, (high - start) / delta))
        enter, leave = max(enter, near), min(leave, far)
    return enter < leave


def beside(x: float, y: float, width: float, height: float, radius: float, ring: float, way: Point) -> Label:
    """The label of a point in one direction, `ring` pixels away from its mark."""
    dx, dy = way
    side = 0 if abs(dx) < 0.5 else 1 if dx > 0 else -1
    cx = x + dx * (radius + 3 + ring) + side * width / 2
    cy = y + dy * (radius + 3 + ring + height / 2)
    box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    anchor = {1: "start", 0: "middle", -1: "end"}[side]
    if not ring:
        return Label(box, anchor, None)
    tip_x, tip_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    away = math.hypot(tip_x - x, tip_y - y) or 1.0
    inner = (radius + 1.5) / away
    return Label(box, anchor, (x + (tip_x - x) * inner, y + (tip_y - y) * inner, tip_x, tip_y))


def place(
    points: Sequence[Point],
    sizes: Sequence[Point],
    bounds: Box,
    important: Sequence[bool],
    lines: Sequence[Segment] = (),
    radius: float = 6.0,
) -> list[Label | None]:
    """One label per point, None where none fits.

    Args: pixel positions of all points; (width, height) of their labels; the area they may use; which ones choose
    first and suffer least; lines that labels avoid if they can, such as error bars.
    """
    marks = [(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    choices = []
    for index, point in enumerate(points):
        others = [mark for i, mark in enumerate(marks) if i != index]
        weight = 2 if important[index] else 1
        found = [(weight * price, label) for price, label in candidates(point, sizes[index], radius, others, lines)]
        choices.append([choice for choice in found if inside(choice[1].box, bounds)])
    order = sorted(range(len(points)), key=lambda index: not important[index])
    best: tuple[float, list[Label | None]] = (math.inf, [None] * len(points))
    for _ in range(ROUNDS):
        prices, placed = settle(choices, order)
        if sum(prices) < best[0]:
            best = (sum(prices), placed)
        order.sort(key=lambda index: -prices[index])
    return best[1]


def settle(
    choices: Sequence[list[tuple[float, Label]]], order: Sequence[int]
) -> tuple[list[float], list[Label | None]]:
    """One greedy round in the given order: what each label paid, and where it went."""
    prices = [HIDDEN] * len(choices)
    placed: list[Label | None] = [None] * len(choices)
    for index in order:
        taken = [label for label in placed if label is not None]
        for price, label in choices[index]:
            if all(apart(label, other) and apart(other, label) for other in taken):
                prices[index], placed[index] = price, label
                break
    return prices, placed


def candidates(
    point: Point, size: Point, radius: float, others: Sequence[Box], lines: Sequence[Segment]
) -> list[tuple[float, Label]]:
    """The places for one label that cover no other mark, the cheapest first."""
    found = []
    for step, ring in enumerate(RINGS):
        for rank, way in enumerate(DIRECTIONS + BETWEEN if ring else DIRECTIONS):
            label = beside(*point, *size, radius, ring, way)
            if any(overlaps(label.box, mark) or (label.leader and crosses(label.leader, mark)) for mark in others):
                continue
            price = rank * 0.25 + step * 4 + 3 * sum(crosses(line, label.box) for line in lines)
            price += 5 * sum(overlaps(grown(label.box, 8), mark) for mark in others)  # whose label would it be?
            found.append((price, label))
    return sorted(found, key=lambda choice: choice[0])


def inside(box: Box, bounds: Box) -> bool:
    return box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]


def apart(label: Label, other: Label) -> bool:
    """Do the texts stand clear of each other, and the first one's leader of the other's text?"""
    return not overlaps(label.box, other.box) and not (label.leader and crosses(label.leader, other.box))
