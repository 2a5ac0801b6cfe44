"""Code blocks of Markdown pages: found, and run as a reader would."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from inlay.cli import main, parser
from inlay.cli.flags import recipe_fields
from inlay.recipe import CompareRecipe, Recipe, load_recipe, read

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?P<note><!--(?:(?!-->).)*-->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
MODULE = "page_of_the_documentation"


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    text: str
    run: bool
    """False after a comment `<!-- not run: why -->`."""


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that have a language, in order."""
    source = page.read_text(encoding="utf-8")
    return [
        Block(
            page, source.count("\n", 0, m.start("language")) + 1, m["language"], m["text"],
            "<!-- not run:" not in (m["note"] or ""),
        )
        for m in FENCE.finditer(source)
    ]  # fmt: skip


def run_page(page: Path) -> None:
    """All blocks of a page one after the other in one namespace and the current folder, as a reader would type them."""
    module = ModuleType(MODULE)
    sys.modules[MODULE] = module  # classes that a page defines must be found by their module
    try:
        for block in blocks(page):
            RUNNERS[block.language](block, module.__dict__)
    finally:
        del sys.modules[MODULE]


def run_python(block: Block, names: dict) -> None:
    """Run, with line numbers as in the page; a block that is not run must be Python all the same."""
    code = compile("\n" * block.line + block.text, str(block.page), "exec", dont_inherit=True)
    if block.run:
        exec(code, names)


def run_commands(block: Block, names: dict) -> None:
    """Every `inlay …` line, and that every `make …` names a target; of what is not run, that it would be understood."""
    for line in commands(block.text):
        words = shlex.split(line, comments=True)
        if words[0] == "inlay" and block.run:
            assert main(words[1:]) == 0, f"{block.page}: {line}"
        elif words[0] == "inlay":
            understand(words[1:])
        elif words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert set(words[1:]) <= set(targets), f"{block.page}: {line}"


def commands(text: str) -> list[str]:
    """The lines of a shell block, continued ones joined, prompts taken off; output lines of a console are left out."""
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def understand(argv: list[str]) -> None:
    """Parse a command line with all its fields and methods, without doing what it says."""
    args = parser().parse_args(argv)
    kinds = {"train": Recipe, "compare": CompareRecipe}
    if args.command in kinds and args.recipe is None:
        load_recipe(None, kinds[args.command], recipe_fields(args, kinds[args.command]))


def read_recipe(block: Block, names: dict) -> None:
    """A recipe must be one that `inlay train` or `inlay compare` reads."""
    path = Path("recipe.yaml")
    path.write_text(block.text, encoding="utf-8")
    load_recipe(path, CompareRecipe if "methods" in read(path) else Recipe)


def ignore(block: Block, names: dict) -> None:
    return


RUNNERS = {
    "python": run_python, "bash": run_commands, "console": run_commands, "yaml": read_recipe, "text": ignore,
}  # fmt: skip
"""What is done with a block, by its language; any other language is a mistake."""
