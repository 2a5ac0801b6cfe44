"""What commands print: JSON for programs, tables for people."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

Render = Callable[[Console], None]


def show(args: argparse.Namespace, document: Any, render: Render) -> None:
    """Print as JSON or for people."""
    if args.json:
        print(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        render(Console())


def listing(columns: list[str], lines: list[list[str]], right: tuple[str, ...] = ()) -> Render:
    """A table with headings; the columns named in `right` hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in right else "left")
    for line in lines:
        table.add_row(*line)
    return lambda console: console.print(table, markup=False)


def facts(pairs: dict[str, Any]) -> Render:
    """Names and values, one below the other."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name.removesuffix("_bytes").replace("_", " "), human(name, value))
    return lambda console: console.print(table, markup=False)


def human(name: str, value: Any) -> str:
    """A value as people read it, by its name: bytes with their unit, shares in percent, counts with separators."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {human(key, item)}" for key, item in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if name.endswith("bytes") and isinstance(value, int):
        return size(value)
    if name == "share":
        return f"{value:.3g} % of the base"
    if name == "seconds":
        return f"{value:.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size(count: int) -> str:
    """Bytes in the decimal unit that leaves a short number."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 1e3 * factor else f"{count / factor:,.0f} {unit}"
    return f"{count} B"
