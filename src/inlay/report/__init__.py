"""Comparisons as tables, plots and files: from a plain `Result` to terminal, Markdown, CSV, JSON, SVG and HTML."""

from inlay.report.across import across
from inlay.report.aggregate import COSTS, pareto, rows
from inlay.report.files import read_json, write_csv, write_json
from inlay.report.html import write_html
from inlay.report.result import Cell, ReportError, Result
from inlay.report.svg import write_svg
from inlay.report.text import markdown, table

__all__ = [
    "COSTS",
    "Cell",
    "ReportError",
    "Result",
    "across",
    "markdown",
    "pareto",
    "read_json",
    "rows",
    "table",
    "write_csv",
    "write_html",
    "write_json",
    "write_svg",
]
