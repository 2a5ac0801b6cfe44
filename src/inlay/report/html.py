"""The report as one HTML file: data, style and script inside, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from inlay.report.files import write_text
from inlay.report.palette import marks, stylesheet
from inlay.report.payload import payload
from inlay.report.result import Result

SCRIPTS = ("base.js", "plot.js", "scatter.js", "table.js", "details.js", "curves.js", "main.js")  # in this order


def asset(name: str) -> str:
    return (resources.files("inlay.report") / "assets" / name).read_text(encoding="utf-8")


def embed(data: Any) -> str:
    """JSON that cannot end the script element it stands in, nor open a comment there."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def digest(text: str) -> str:
    """The source of a Content-Security-Policy that allows exactly this inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def write_html(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write the report: table, plot of quality against cost, learning curves, settings of every row.

    The page needs no network and forbids itself any (by its Content-Security-Policy, which also lets no script run
    but its own). Raises ReportError for an empty result.
    """
    found = marks(cell.kind for cell in result.cells)
    data = embed(payload(result, found))
    style = asset("report.css") + stylesheet(found, "k")
    script = '"use strict";\n(() => {\n' + "\n".join(map(asset, SCRIPTS)) + "\n})();\n"
    parts = {
        "title": html.escape(result.title),
        "style": style,
        "script": script,
        "data": data,
        "style-hash": digest(style),
        "script-hash": digest(script),
    }
    page = re.sub(r"\{\{([a-z-]+)\}\}", lambda match: parts[match[1]], asset("report.html"))
    return write_text(path, page)
