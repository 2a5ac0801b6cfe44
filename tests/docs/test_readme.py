"""Every command of the README and of the guide does what it says, on less data where it is a long one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks, commands, run_python

from inlay.cli import main

SMALLER = {
    "train": "--limit 60 --steps 2 --max-length 16",
    "compare": "--limit 32 --steps 2 --max-length 16 --workers 1 --seeds 0",
    "evaluate": "--limit 20",
    "data": "--limit 60",
}
"""What is added to a long command; all else is as it stands on the page."""

NO_DATA = ("data", "data list", "data fetch")


def recipe_of(target: str) -> list[str]:
    """The commands of a Makefile target."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert found, f"the Makefile has no target {target}"
    return [line.strip() for line in found[1].splitlines()]


def lines_of(page: str) -> list[str]:
    """The commands of a page's console and shell blocks; `make demo` stands for what the Makefile runs for it."""
    found = [
        line for block in blocks(ROOT / page) if block.language in ("console", "bash") for line in commands(block.text)
    ]
    assert found, f"{page} shows no commands"
    return [inner for line in found for inner in (made(line) if line.startswith("make ") else [line])]


def made(line: str) -> list[str]:
    """What `make …` runs; its inlay commands without the path of the environment."""
    (target,) = shlex.split(line, comments=True)[1:]
    steps = recipe_of(target)
    inlay = [step.removeprefix("$(BIN)/") for step in steps if step.startswith("$(BIN)/inlay ")]
    assert inlay or any("pytest" in step for step in steps), f"{line}: neither inlay nor the tests"  # we are in those
    return inlay


def smaller(words: list[str]) -> list[str]:
    """A command on less data."""
    plain = " ".join(words) in NO_DATA
    more = [] if plain else shlex.split(SMALLER.get(words[0], ""))
    return [*words, *more]


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_every_command_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for line in lines_of(page):
        words = shlex.split(line, comments=True)
        assert words[0] == "inlay", f"{page} shows a command that this test does not know: {line}"
        if words[1] == "inspect" and not Path(words[2]).exists():
            continue  # of an adapter that the page's Python made: test_code_blocks runs it
        status = main(smaller(words[1:]))
        out, err = capsys.readouterr()
        assert status == 0, f"{line}: {err}"
        assert out.strip(), line
    assert list((tmp_path / "runs").rglob("adapter.safetensors"))


def test_the_readme_s_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = [block for block in blocks(ROOT / "README.md") if block.language == "python"]
    names: dict = {}
    for block in found:
        run_python(block, names)
    assert names["piece"].adapter_parameters == 12 * (256 + 384)


# ---------------------------------------------------------------------- the test can fail
def test_a_wrong_command_is_caught(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```console\n$ inlay methods lorra\noutput\n```\n", encoding="utf-8")
    assert lines_of(str(tmp_path / "page.md")) == ["inlay methods lorra"]
    assert main(smaller(["methods", "lorra"])) == 2


def test_make_demo_is_the_comparison() -> None:
    assert made("make demo     # comment") == ["inlay compare recipes/demo.yaml"]
    assert made("make test") == []
    with pytest.raises(AssertionError):
        made("make lint")
    with pytest.raises(AssertionError):
        made("make nothing")
