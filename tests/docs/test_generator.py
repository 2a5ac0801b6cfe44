"""The generator: what it measures is what the library says, and it tells stale pages from current ones."""

from __future__ import annotations

import sys

import pytest
from doc_blocks import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import build
from generator import markdown
from generator.counts import Count, counts
from generator.measure import Cell, Trial, cell_of, specifications
from generator.places import PLACES, Place
from generator.sections import pair
from generator.support import compile_jobs, line

import inlay
from inlay.core.method import REGISTRY
from inlay.plan import plan

BY_NAME = {place.name: place for place in PLACES}


def test_counts_are_those_of_the_plan() -> None:
    found = counts("vit-base", ["lora", "prompttuning"])
    told = plan("vit-base", "lora", memory=False)
    assert found["lora"] == Count(told.sites, told.adapter_parameters, told.head_parameters, told.base_parameters)
    assert told.adapter_parameters == 294_912
    assert "inputs_embeds" in found["prompttuning"].refused


def test_specifications_hold_every_method_and_compositions() -> None:
    assert {text for text in specifications() if "(" not in text} == set(REGISTRY)
    assert "dora(of=vera)" in specifications()
    assert "dora(of=lora)" not in specifications()  # the default


def test_cells_of_lora() -> None:
    assert cell_of("lora", BY_NAME["Linear"]).works == {"attach", "merge", "several", "stack", "route", "peft"}
    assert cell_of("lora", BY_NAME["Linear"]).refused == {}
    norm = cell_of("lora", BY_NAME["norm"])
    assert norm.works == set()
    assert norm.refused["attach"].startswith("*place* holds no matrix")


def test_a_cell_says_why_something_is_refused() -> None:
    cell = cell_of("houlsby", BY_NAME["Linear"])
    assert cell.works == {"attach", "several", "stack", "route"}
    assert cell.refused["merge"].startswith("*method* at *place* cannot be merged")
    assert set(cell.refused) == {"merge", "peft"}


def test_reasons_that_hold_everywhere_stand_beside_the_name() -> None:
    notes = markdown.Notes()
    here = Cell({"attach", "stack"}, {"merge": "never", "peft": "not here"})
    there = Cell({"attach", "stack"}, {"merge": "never"})
    nowhere = Cell(refused={"attach": "no matrix"})
    name, *marks = line("lora", {"Linear": here, "Conv1D": there, "norm": nowhere}, notes)
    assert name == "[LoRA](methods/lora.md) <sup>1</sup>"
    assert dict(zip([p.name for p in PLACES], marks, strict=True)) == {p.name: "·" for p in PLACES} | {
        "Linear": "✓K <sup>2</sup>", "Conv1D": "✓K", "norm": "– <sup>3</sup>",
    }  # fmt: skip
    assert notes.texts == ["**M** never", "**P** not here", "no matrix"]


def test_a_defect_stops_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that attaches, merges to other numbers and says nothing is not a refusal: nothing is written."""
    monkeypatch.setattr(inlay.core.adapter.Adapter, "merge", lambda self: None)
    monkeypatch.setattr(inlay.core.adapter.Adapter, "unmerge", lambda self: None)
    monkeypatch.setattr("generator.measure.output", noisy(sys.modules["generator.measure"].output))
    with pytest.raises(AssertionError, match="relative difference"):
        cell_of("lora", BY_NAME["Linear"])


def noisy(output):
    calls = []

    def wrong(model, inputs):
        calls.append(None)
        return output(model, inputs) + (1.0 if len(calls) > 2 else 0.0)

    return wrong


def test_a_place_is_the_same_every_time() -> None:
    place: Place = BY_NAME["block"]
    a, b = (Trial("lora", BY_NAME["packed"]) for _ in range(2))
    assert a.a.equal(b.a)
    assert all(p.equal(q) for p, q in zip(place.model().parameters(), place.model().parameters(), strict=True))


def test_pairs() -> None:
    notes = markdown.Notes()
    assert pair("dora", "lora", notes) == "✓"
    assert pair("lora", "dora", notes).startswith("–")
    assert "must come first" in notes.texts[0]


def test_every_method_and_every_place_is_compiled_somewhere() -> None:
    methods, names = ("ia3", "lora", "normtuning"), ("Linear", "Conv2d", "norm")
    cells = {text: {name: cell_of(text, BY_NAME[name]) for name in names} for text in methods}
    assert compile_jobs(cells) == [("ia3", "Linear"), ("lora", "Linear"), ("normtuning", "norm"), ("lora", "Conv2d")]


def test_sections_are_put_between_their_marks() -> None:
    page = "a\n<!-- generated: x -->\nold\n<!-- end: x -->\nb\n"
    once = markdown.filled(page, {"x": "| new |\n"})
    assert once == "a\n<!-- generated: x -->\n\n| new |\n\n<!-- end: x -->\nb\n"
    assert markdown.filled(once, {"x": "| new |\n"}) == once
    with pytest.raises(ValueError, match="no place for the section 'y'"):
        markdown.filled(page, {"y": ""})


def test_tables_and_links() -> None:
    assert markdown.table(["a", "b"], [["x | y", 1]]) == "| a | b |\n| --- | --- |\n| x \\| y | 1 |\n"
    assert markdown.linked("Hu, arXiv 2106.09685") == "Hu, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685)"
    notes = markdown.Notes()
    assert [notes.mark("a"), notes.mark("b"), notes.mark("a")] == ["<sup>1</sup>", "<sup>2</sup>", "<sup>1</sup>"]
    assert notes.listed() == "1. a\n2. b\n"


def test_stale_pages_are_named(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "lora.md").write_text("new", encoding="utf-8")
    (tmp_path / "methods" / "gone.md").write_text("old", encoding="utf-8")
    (tmp_path / "support.md").write_text("old", encoding="utf-8")
    written = {"methods/lora.md": "new", "methods/vera.md": "new", "support.md": "new"}
    assert build.stale(written, tmp_path) == ["methods/vera.md", "support.md", "methods/gone.md"]
    monkeypatch.setattr(build, "DOCS", tmp_path)
    monkeypatch.setattr(build, "pages", lambda workers: written)
    assert build.main(["--check"]) == 1
    assert capsys.readouterr().out.count("is out of date") == 3
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    assert not (tmp_path / "methods" / "gone.md").exists()
