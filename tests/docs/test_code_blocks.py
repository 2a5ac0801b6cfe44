"""Every block of code in the documentation runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_blocks import ROOT, Block, blocks, run_page, understand

from inlay.core.errors import InlayError
from inlay.core.method import REGISTRY, method_class

method_class("lora")  # registers all
DOCS = ROOT / "docs"
PAGES = [ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("methods/*.md"))]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages write into the current folder, and may register methods, which must not stay."""
    monkeypatch.chdir(tmp_path)
    before = dict(REGISTRY)
    yield
    assert before == REGISTRY, "the page leaves methods registered"


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES])
def test_page_runs(page: Path) -> None:
    run_page(page)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_method_has_its_page_with_code(name: str) -> None:
    languages = [block.language for block in blocks(ROOT / "docs" / "methods" / f"{name}.md") if block.run]
    assert languages == ["python", "bash"]


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *PAGES]:
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


# ---------------------------------------------------------------------- the tests can fail
def page(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_blocks_share_names_and_are_found_with_their_lines(tmp_path: Path) -> None:
    found = page(
        tmp_path, "# T\n\n```python\na = 1\n```\n\ntext\n\n<!-- not run: no -->\n```python\nb = missing\n```\n"
    )
    assert [(b.line, b.run) for b in blocks(found)] == [(3, True), (10, False)]
    run_page(found)
    run_page(page(tmp_path, "```python\na = 1\n```\n```python\nassert a == 1\n```\n"))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nassert 1 == 2\n```\n", AssertionError),
        ("<!-- not run: slow -->\n```python\nnot a python\n```\n", SyntaxError),
        ("```bash\ninlay methods lorra\n```\n", AssertionError),
        ("```bash\nmake nothing\n```\n", AssertionError),
        ("```yaml\nmodel: minilm\n```\n", InlayError),
        ("```perl\n1\n```\n", KeyError),
    ],
)
def test_a_wrong_block_is_caught(tmp_path: Path, text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run_page(page(tmp_path, text))


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--model", "minilm", "--data", "trec", "--method", "lora", "--set", "rank=4"],
        ["train", "--model", "minilm", "--method", "lora"],
        ["compare", "--model", "minilm", "--data", "trec", "--methods", "lora, lora"],
    ],
)
def test_a_command_that_is_not_run_must_be_right_all_the_same(argv: list[str]) -> None:
    with pytest.raises(InlayError):
        understand(argv)


def test_a_block_knows_its_page(tmp_path: Path) -> None:
    assert isinstance(blocks(page(tmp_path, "```text\nx\n```\n"))[0], Block)
