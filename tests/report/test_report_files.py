"""Files and numbers: lossless JSON, CSV, tables, the static plot, atomic writes."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from synthetic_result import comparison

from inlay.report import COSTS, ReportError, markdown, read_json, rows, table, write_csv, write_html, write_json
from inlay.report import write_svg as draw
from inlay.report.labels import Label, apart, overlaps, place
from inlay.report.numbers import count, percent, ratio, scale, seconds, size


@pytest.fixture(scope="module")
def result():
    return comparison()


def without_nan(value):
    """NaN differs from itself; as a string it can be compared."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def test_json_gives_the_result_back(result, tmp_path):
    odd = dataclasses.replace(
        result.cells[0],
        settings={"where": ("attn.q", "attn.v"), "scale": math.inf, "path": Path("a/b"), "n": np.int64(3), "x": "NaN"},
        metrics={"accuracy": math.nan, "macro_f1": np.float32(0.5)},
        seed=99,
        method="odd </script> “label”",
    )
    full = dataclasses.replace(result, cells=[*result.cells, odd])
    again = read_json(write_json(full, tmp_path / "result.json"))
    assert without_nan(dataclasses.asdict(again)) == without_nan(dataclasses.asdict(full))
    assert again.cells[-1].settings["where"] == ["attn.q", "attn.v"]
    assert again.cells[-1].settings["scale"] == math.inf
    assert again.cells[-1].settings["x"] == "NaN"
    assert math.isnan(again.cells[-1].metrics["accuracy"])
    finished = dataclasses.replace(result, cells=[cell for cell in result.cells if cell.error is None])
    assert read_json(write_json(finished, tmp_path / "finished.json")) == finished


def test_json_is_standard_json(result, tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(write_json(result, tmp_path / "r.json").read_text("utf-8"), parse_constant=refuse)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "holds no comparison"),
        ('{"format": "inlay-comparison", "version": 9}', "version 9"),
        ('{"format": "inlay-comparison", "version": 1, "result": {"title": "x"}}', "damaged"),
    ],
)
def test_a_file_that_holds_no_result_is_refused(text, message, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=message):
        read_json(path)


def test_csv_has_a_line_per_row_with_unrounded_numbers(result, tmp_path):
    with open(write_csv(result, tmp_path / "r.csv"), encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    expected = rows(result)
    assert [line["method"] for line in lines] == [row["method"] for row in expected]
    assert float(lines[4]["accuracy"]) == expected[4]["metrics"]["accuracy"]["mean"]
    assert float(lines[4]["macro_f1_deviation"]) == expected[4]["metrics"]["macro_f1"]["deviation"]
    assert lines[-1]["status"] == "failed"
    assert lines[-1]["accuracy"] == ""
    assert "NaN at step 140" in lines[-1]["error"]


def test_writes_are_atomic(result, tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        for write in (write_html, write_json, write_csv, draw):
            with pytest.raises(OSError, match="disk full"):
                write(result, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.html"]
    path.unlink()
    assert write_html(result, path).stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_terminal_table_never_cuts_a_number(result):
    for width in (60, 80, 100, 140, 220):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        with console.file:
            console.print(table(result, width))
        lines = console.export_text().splitlines()
        drawn = next(line for line in lines if line.strip().startswith("LoRA r=8"))
        row = next(row for row in rows(result) if row["method"] == "LoRA r=8")
        mean = row["metrics"]["accuracy"]["mean"]
        assert f"{100 * mean:.1f} ± " in drawn
        assert "…" not in drawn
        assert "147.5K" in drawn
        assert ("236.0 MB" in drawn) == (width == 220)
        assert any("out of memory" in line for line in lines)


def test_markdown_has_cells_for_every_column_and_escapes(result):
    label = "a|b <img> *x*"
    cells = [dataclasses.replace(cell, method=label) if cell.method == "BitFit" else cell for cell in result.cells]
    lines = markdown(dataclasses.replace(result, cells=cells)).splitlines()
    body = [line for line in lines if line.startswith("|")]
    assert len(body) == 2 + len(rows(result))
    assert len({line.replace("\\|", "").count("|") for line in body}) == 1
    assert r"a\|b &lt;img> \*x\*" in "\n".join(body)
    assert sum("**" in line for line in body) == 1  # full fine-tuning is best in all three
    assert "| GaLore r=64 | failed (seeds 0, 1, 2): out of memory" in "\n".join(body)


@pytest.mark.parametrize("x", COSTS)
def test_svg_is_well_formed_and_holds_every_method(result, x, tmp_path):
    root = ElementTree.parse(draw(result, tmp_path / "plot.svg", x)).getroot()
    space = "{http://www.w3.org/2000/svg}"
    finished = [row for row in rows(result) if row["status"] == "finished"]
    groups = root.findall(f"{space}g")
    assert len(groups) == len(finished)
    filled = [group for group in groups if "off" not in group.find(f"{space}path").get("class")]
    assert len(filled) == sum(row["pareto"][x] for row in finished)
    texts = {text.text for text in root.iter(f"{space}text")}
    assert {row["method"] for row in finished} <= texts  # a label for each found its place
    assert not [item for item in root.iter() if item.tag.endswith(("script", "image", "use"))]


def test_svg_names_known_costs(result, tmp_path):
    with pytest.raises(ReportError, match="did you mean 'train_seconds'"):
        draw(result, tmp_path / "plot.svg", "train_second")


def test_all_failed_gives_files_that_say_so(result, tmp_path):
    lost = dataclasses.replace(result, cells=[cell for cell in result.cells if cell.error])
    assert "No run finished" in draw(lost, tmp_path / "plot.svg").read_text("utf-8")
    assert "out of memory" in markdown(lost)
    assert "out of memory" in write_html(lost, tmp_path / "r.html").read_text("utf-8")
    assert table(lost).row_count == 2


@pytest.mark.parametrize("write", [write_html, write_csv, draw])
def test_an_empty_result_makes_no_file(write, result, tmp_path):
    with pytest.raises(ReportError, match="no runs"):
        write(dataclasses.replace(result, cells=[]), tmp_path / "r")
    assert not os.listdir(tmp_path)


def test_numbers_as_people_read_them():
    assert [count(v) for v in (0, 768, 999, 1000, 294_912, 999_949, 999_950, 124_645_632)] == [
        "0", "768", "999", "1.0K", "294.9K", "999.9K", "1.0M", "124.6M",
    ]  # fmt: skip
    assert [size(v) for v in (512, 1_234_000, None)] == ["512 B", "1.2 MB", "–"]
    assert [seconds(v) for v in (0.42, 8.06, 42.4, 59.6, 125, 3599.7, 4350)] == [
        "0.42 s", "8.1 s", "42 s", "1 min 00 s", "2 min 05 s", "1 h 00 min", "1 h 12 min",
    ]  # fmt: skip
    assert [ratio(v) for v in (0.352, 1, 12.3)] == ["0.35×", "1.00×", "12×"]
    assert [percent(v) for v in (0, 0.00123, 0.0537, 0.24, 1.31, 100)] == [
        "0 %", "0.0012 %", "0.054 %", "0.24 %", "1.3 %", "100 %",
    ]  # fmt: skip
    accuracy, loss = scale([0.9, 0.91], False), scale([0.9], True)
    assert accuracy.spread({"mean": 0.9123, "deviation": 0.0041}) == "91.2 ± 0.4"
    assert loss.spread({"mean": 0.9123, "deviation": None}) == "0.912"
    assert scale([math.nan, None], False).show(None) == "–"


def test_labels_do_not_overlap():
    points = [(100 + 9 * (index % 5), 100 + 7 * (index // 5)) for index in range(15)]
    placed = place(points, [(70.0, 15.0)] * 15, (0, 0, 400, 300), [index < 3 for index in range(15)])
    found = [label for label in placed if label is not None]
    assert len(found) >= 6  # those in the middle of the heap cannot get out
    for index, label in enumerate(found):
        assert 0 <= label.box[0] < label.box[2] <= 400
        assert not any(overlaps(label.box, (x - 6, y - 6, x + 6, y + 6)) for x, y in points)
        assert all(apart(label, other) for other in found[:index] + found[index + 1 :])
    touching = Label((0, 0, 10, 10), "start", None)
    assert not apart(touching, Label((5, 5, 15, 15), "start", None))
