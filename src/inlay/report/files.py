"""Files that a program reads: the lossless JSON and the CSV of the table. Every write is atomic."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from inlay.report.aggregate import COSTS, rows
from inlay.report.result import Cell, ReportError, Result

FORMAT = "inlay-comparison"
VERSION = 1
NOT_FINITE = "$float"  # JSON has no NaN: {"$float": "nan"}


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text so that `path` holds either the old content or all of the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def umask() -> int:
    """The permissions a new file must not have; mkstemp would leave ours readable by its owner only."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def encode(value: Any) -> Any:
    """Plain data with numbers that JSON lacks (NaN, infinities) as `{"$float": "nan"}`."""
    if isinstance(value, float) and not math.isfinite(value):
        return {NOT_FINITE: repr(value)}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, list) else value


def decode(value: dict[str, Any]) -> Any:
    return float(value[NOT_FINITE]) if list(value) == [NOT_FINITE] else value


def write_json(result: Result, path: str | os.PathLike[str]) -> Path:
    """Everything that was measured, run by run, losslessly: `read_json` gives the Result back."""
    document = {"format": FORMAT, "version": VERSION, "result": encode(dataclasses.asdict(result))}
    return write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Result:
    """The Result that `write_json` wrote. Raises ReportError if the file is not one, or of a later version."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"), object_hook=decode)
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}); it may be damaged or cut short") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ReportError(f"{path} holds no comparison; expected a file written by `inlay compare`")
    if document.get("version") != VERSION:
        found = document.get("version")
        raise ReportError(f"{path} has version {found}, but this inlay reads version {VERSION}; update inlay")
    try:
        fields = dict(document["result"])
        return Result(**{**fields, "cells": [Cell(**cell) for cell in fields["cells"]]})
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path} is damaged: {error}") from None


def write_csv(result: Result, path: str | os.PathLike[str]) -> Path:
    """The table as unrounded numbers, one line per row of `rows`; what was not measured is left empty."""
    lines = [flat(row, result.metrics) for row in rows(result)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return write_text(path, text.getvalue())


def flat(row: dict[str, Any], metrics: list[str]) -> dict[str, Any]:
    line: dict[str, Any] = {"method": row["method"], "kind": row["kind"], "status": row["status"]}
    line |= {"seeds": " ".join(map(str, row["seeds"])), "n": row["n"]}
    for name, value in [*((name, row["metrics"][name]) for name in metrics), ("average", row["average"])]:
        line |= {name: value["mean"], f"{name}_deviation": value["deviation"]}
    line |= {key: row[key] for key in ("adapter_parameters", "head_parameters", "base_parameters", "share_percent")}
    line |= {key: row[key] for key in ("file_bytes", "train_seconds", "train_seconds_deviation", "relative_seconds")}
    line |= {key: row[key] for key in ("peak_memory_bytes", "saved_for_backward_bytes")}
    line |= {f"front_{cost}": "" if row["n"] == 0 else int(row["pareto"][cost]) for cost in COSTS}
    return line | {"error": row["error"]}
