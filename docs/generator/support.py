"""The support matrix, `docs/support.md`, and the table of pairs in `docs/composition.md`."""

from __future__ import annotations

from collections.abc import Set

from inlay.core.method import DeltaMethod, method_from
from inlay.interop.peft import WRITTEN_FOR, support

from .markdown import HEADER, Notes, code, table
from .measure import Cell
from .places import PLACES

LETTERS = {"merge": "M", "several": "S", "stack": "K", "route": "R", "peft": "P"}
"""Capabilities beside attaching, by what they are called in `Cell` and in the matrix."""

INTRO = """# What works where

Every mark in this page was found by trying: a small network with that kind of site is built, the method is attached
to it, and what the letter says is done and compared. Nothing here is written by hand.

| | |
| --- | --- |
| ✓ | attaches there and changes the output |
| M | merges: the merged network equals the adapted one, and un-merging restores the base bit for bit |
| S | two adapters of the method switch (`inlay.use`) and rest (`inlay.disabled`) without residue |
| K | two adapters of the method act at once, stacked |
| R | rows of one batch go to different adapters (`inlay.route`), equal to running them one by one |
| P | written as a Hugging Face PEFT folder and read back, it computes the same |
| – | refused when attaching, with the reason below |
| · | not asked: methods on tokens and attentions name their own places, others are given one; a head alone has none |

A letter that is missing is refused. The numbers point to the reasons, with the letter they are about; one beside a
method's name holds wherever the method attaches.

"""

COMPILE = """
## Compiling

One forward and backward pass under `torch.compile(fullgraph=True)`, graph capture with torch's `eager` backend: one
graph without breaks, output and gradients as without compiling. Tried for every method at the first place above that
takes it, and at every kind of place with the first method that takes it. All other combinations are left to the tests.

"""

PEFT = f"""
## PEFT folders

Read and written in the layout of PEFT {WRITTEN_FOR}. A folder with a field that is refused, or that inlay does not know
and that is not empty, is not loaded. The field tables are in [peft.md](peft.md).

"""


def support_page(cells: dict[str, dict[str, Cell]], compiled: dict[tuple[str, str], str]) -> str:
    """The whole page; `cells` by method and place, `compiled` says why a (method, place) does not compile."""
    notes = Notes()
    rows = [line(text, row, notes) for text, row in cells.items()]
    page = HEADER + INTRO + table(["method", *(place.name for place in PLACES)], rows)
    page += "\n" + table(["column", "is"], [[place.name, place.what] for place in PLACES])
    page += "\n" + notes.listed()
    notes = Notes()
    tried = [[name_of(text), where, verdict(why, notes)] for (text, where), why in compiled.items()]
    page += COMPILE + table(["method", "at", "one graph"], tried)
    page += ("\n" + notes.listed() if notes.texts else "") + PEFT
    return page + table(["PEFT method", "folders are", "what corresponds to it, and where"], peft_kinds())


def peft_kinds() -> list[list[str]]:
    """PEFT's methods, read or written or refused; those of no counterpart last."""
    found = [[row["peft_type"], row["use"], row["note"]] for row in support() if not row["field"]]
    return sorted(found, key=lambda row: row[1] == "refused")


def line(text: str, row: dict[str, Cell], notes: Notes) -> list[str]:
    """A method's row of the matrix."""
    attached = [cell.refused for cell in row.values() if "attach" in cell.works]
    always = {
        (what, why) for what, why in (attached[0].items() if attached else ())
        if len(attached) > 1 and all(refused.get(what) == why for refused in attached)
    }  # fmt: skip
    beside = marks(dict(always), notes)
    return [f"{name_of(text)} {beside}".rstrip(), *(mark(row.get(place.name), notes, always) for place in PLACES)]


def marks(refused: dict[str, str], notes: Notes) -> str:
    """The numbers of reasons, in the order of the letters."""
    return "<sup>,</sup>".join(
        notes.mark(f"**{letter}** {refused[name]}") for name, letter in LETTERS.items() if name in refused
    )


def name_of(text: str) -> str:
    """The method's name, linked to its page."""
    method = method_from(text)
    name = "(".join([type(method).__name__, *text.partition("(")[2:]]) if "(" in text else type(method).__name__
    return f"[{name}](methods/{method.name()}.md)"


def mark(cell: Cell | None, notes: Notes, always: Set[tuple[str, str]] = frozenset()) -> str:
    """A cell of the matrix; the reasons in `always` stand beside the method's name."""
    if cell is None:
        return "·"
    if "attach" in cell.refused:
        return "– " + notes.mark(cell.refused["attach"])
    letters = "".join(letter for name, letter in LETTERS.items() if name in cell.works)
    own = {name: why for name, why in cell.refused.items() if (name, why) not in always}
    return f"✓{letters} {marks(own, notes)}".rstrip()


def verdict(why: str, notes: Notes) -> str:
    return "no " + notes.mark(why) if why else "✓"


def compile_jobs(cells: dict[str, dict[str, Cell]]) -> list[tuple[str, str]]:
    """(method, place) pairs to compile: every method at its first place, and something at every place left."""
    takes = [(text, name) for text, row in cells.items() for name, cell in row.items() if "attach" in cell.works]
    jobs = {text: (text, name) for text, name in reversed(takes)}
    first = {name: (text, name) for text, name in sorted(takes, key=lambda job: order(job[0]), reverse=True)}
    covered = {name for _, name in jobs.values()}
    return [*reversed(jobs.values()), *(first[place.name] for place in PLACES if place.name in set(first) - covered)]


def order(text: str) -> tuple[bool, str]:
    """Plain updates of matrices first: most kinds of places take them."""
    return not isinstance(method_from(text), DeltaMethod), text


def peft_page() -> str:
    """Every field of PEFT's configurations, and what becomes of it."""
    page = HEADER + (
        "# Fields of PEFT folders\n\n"
        "`inlay.load` reads a PEFT folder, `inlay.export_peft` writes one ([guide](guide.md#peft-folders)).\n"
        "For each kind, what becomes of the fields of its `adapter_config.json`: *read* is followed, *no effect* is\n"
        "not needed, and a folder where a *refused* field is set is not loaded. A field that is not listed is refused\n"
        "unless it is empty.\n"
    )
    for kind, use, note in peft_kinds():
        fields = [row for row in support() if row["field"] and row["peft_type"] == kind]
        page += f"\n## {kind[0].upper() + kind[1:]}\n\n{use.capitalize()}: {note}.\n"
        if fields:
            lines = [[code(row["field"]), row["use"], row["note"]] for row in fields]
            page += "\n" + table(["field", "in a folder that is read", "remark"], lines)
    return page


__all__ = ["compile_jobs", "peft_page", "support_page"]
