"""Markdown from plain data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

HEADER = "<!-- Written by docs/build.py. Change the code or the generator, then run `make docs`. -->\n\n"
BEGIN, END = "<!-- generated: {} -->", "<!-- end: {} -->"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell(value) for value in line) + " |\n" for line in lines)


def cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def code(text: object) -> str:
    """Inline code; empty for an empty text."""
    return f"`{text}`" if str(text) else ""


def linked(paper: str) -> str:
    """A paper with its arXiv numbers as links."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@dataclass
class Notes:
    """Numbered notes under a table; the same text has one number."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        """The superscript that points to a text."""
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"

    def listed(self) -> str:
        return "".join(f"{i}. {cell(text)}\n" for i, text in enumerate(self.texts, 1))


def filled(page: str, sections: dict[str, str]) -> str:
    """A hand-written page with its generated sections put between their marks.

    Raises:
        ValueError: a page without the marks of a section.
    """
    for name, text in sections.items():
        begin, end = BEGIN.format(name), END.format(name)
        if begin not in page or end not in page:
            raise ValueError(f"no place for the section '{name}': write '{begin}' and '{end}' where it goes")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{text.strip()}\n\n{end}{rest.partition(end)[2]}"
    return page
