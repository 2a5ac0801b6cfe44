"""Write the generated pages of the documentation: `python docs/build.py`; `--check` lists pages that are out of date.

Everything is found out from the library: the registry, typed fields, tables of architectures, and above all by trying,
on small random networks and on shapes alone. The same library gives the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from generator.counts import ARCHITECTURES, OWN, counts
from generator.markdown import filled
from generator.measure import Cell, compiles, measured, specifications
from generator.method_pages import index, method_page
from generator.places import PLACES
from generator.results import SECTIONS, committed
from generator.sections import names_section, pairs_section, recipe_sections
from generator.support import compile_jobs, peft_page, support_page

from inlay.core.files import write_text
from inlay.core.method import REGISTRY, method_from

DOCS = Path(__file__).resolve().parent


def pages(workers: int) -> dict[str, str]:
    """Every generated page by its path in `docs/`, and every page with generated sections."""
    methods = specifications()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=calm) as run:
        counting = {arch: run.submit(counts, arch, methods) for arch in ARCHITECTURES}
        for model_type, arch in OWN.items():
            own = [text for text in methods if method_from(text).architecture == model_type]
            counting[arch] = run.submit(counts, arch, own)
        measuring = {text: run.submit(measured, text) for text in methods}
        cells = {text: job.result() for text, job in measuring.items()}
        pairing = run.submit(pairs_section, at_linear(cells))
        compiling = {job: run.submit(compiles, *job) for job in compile_jobs(cells)}
        found = {arch: job.result() for arch, job in counting.items()}
        compiled = {pair: job.result() for pair, job in compiling.items()}
        pairs = pairing.result()
    written = {f"methods/{name}.md": method_page(name, found, cells[name]) for name in sorted(REGISTRY)}
    written["methods/README.md"] = index(found)
    written["support.md"] = support_page(cells, compiled)
    written["peft.md"] = peft_page()
    tasks = committed()
    for page, sections in {
        "places.md": {"names": names_section()},
        "recipes.md": recipe_sections(),
        "composition.md": {"pairs": pairs},
        **{page: {name: make(tasks) for name, make in made.items()} for page, made in SECTIONS.items()},
    }.items():
        written[page] = filled((DOCS / page).read_text(encoding="utf-8"), sections)
    return written


def calm() -> None:
    """One thread per process: sums must not depend on how many there are."""
    torch.set_num_threads(1)


def at_linear(cells: dict[str, dict[str, Cell]]) -> list[str]:
    """The plain methods that a linear layer takes."""
    place = PLACES[0].name
    return [text for text, row in cells.items() if "(" not in text and place in row and "attach" in row[place].works]


def stale(written: dict[str, str], docs: Path) -> list[str]:
    """Pages whose file is missing or differs, and method pages that no method has any more."""
    differing = [page for page, text in written.items() if not same(docs / page, text)]
    kept = {page for page in written if page.startswith("methods/")}
    extra = [f"methods/{path.name}" for path in sorted((docs / "methods").glob("*.md"))]
    return differing + [page for page in extra if page not in kept]


def same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default 2)")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    written = pages(args.workers)
    old = stale(written, DOCS)
    print(f"{len(written)} pages made in {time.monotonic() - begin:.0f} s, {len(old)} out of date", file=sys.stderr)
    if args.check:
        print("".join(f"docs/{page} is out of date: run `make docs`\n" for page in old), end="")
        return 1 if old else 0
    for page in old:
        if page in written:
            write_text(DOCS / page, written[page])
        else:
            (DOCS / page).unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
