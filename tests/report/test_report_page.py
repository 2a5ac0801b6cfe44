"""The page in a browser: built from a file, clicked through, with nothing in the console and nothing from the net."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from report_browser import problems, requests
from synthetic_result import METHODS, comparison

from inlay.report import COSTS, markdown, rows, write_html
from inlay.report.html import embed
from inlay.report.payload import curves, mean_curve, payload, thin

EVIL = '</script><script>window.injected = 1</script><img src=x onerror="window.injected = 2">'


@pytest.fixture(scope="module")
def result():
    return comparison()


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    return write_html(result, tmp_path_factory.mktemp("report") / "report.html")


def css(driver, selector):
    return driver.find_elements("css selector", selector)


def click(driver, selector):
    element = css(driver, selector)[0]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def column(driver, heading):
    """The numbers of one column of the table, without failed rows."""
    script = """
        const words = (node) => node.innerText.trim().replace(/\\s+/g, " ");
        const heads = [...document.querySelectorAll("#results thead th")].map(words);
        const place = heads.findIndex((text) => text.replace(/ [↑↓]$/, "") === arguments[0]);
        const rows = [...document.querySelectorAll("#results tbody tr:not(.failed)")];
        return rows.map((row) => words(row.children[place]));
    """
    return driver.execute_script(script, heading)


def test_table_holds_every_method_and_sorts(result, page, open_report):
    driver = open_report(page)
    assert driver.title == result.title
    assert css(driver, "h1")[0].text == result.title
    expected = rows(result)
    finished = [row for row in expected if row["status"] == "finished"]
    names = column(driver, "Method")
    assert names == [r["method"] for r in sorted(finished, key=lambda r: -r["metrics"]["accuracy"]["mean"])]
    failed = [row.text for row in css(driver, "#results tr.failed")]
    assert len(failed) == 2
    assert "out of memory: 3.1 GB asked" in failed[0]

    click(driver, "button[data-column=adapter_parameters]")
    sizes = {row["method"]: row["adapter_parameters"] for row in finished}
    assert [sizes[name] for name in column(driver, "Method")] == sorted(sizes.values())
    sorted_by = css(driver, "#results thead th[aria-sort=ascending]")
    assert [item.text.split() for item in sorted_by] == [["Adapter", "parameters"]]
    click(driver, "button[data-column=adapter_parameters]")
    assert [sizes[name] for name in column(driver, "Method")] == sorted(sizes.values(), reverse=True)
    click(driver, "button[data-column=method]")
    assert column(driver, "Method")[0] == "BitFit"
    assert not problems(driver)


def test_page_and_markdown_show_the_same_numbers(result, page, open_report):
    driver = open_report(page)
    lines = [line for line in markdown(result).splitlines() if line.startswith("| ") and "failed" not in line]
    table = [[text.strip().strip("*") for text in line.strip("|").split("|")] for line in lines]
    heads = table[0]
    pairs = {
        "accuracy": "accuracy", "macro f1": "macro f1", "average": "average", "Adapter": "Adapter parameters",
        "Share": "Share of model", "File": "File", "Time ×full": "Time ×full", "Peak memory": "Peak memory",
        "Saved for backward": "Saved for backward", "Seeds": "Seeds", "Head": "Head parameters",
    }  # fmt: skip
    names = column(driver, "Method")
    for short, heading in pairs.items():
        place = heads.index(short)
        assert dict(zip(names, column(driver, heading), strict=True)) == {row[0]: row[place] for row in table[1:]}


def test_every_tab_draws_and_a_point_shows_its_settings(result, page, open_report):
    driver = open_report(page)
    finished = [row for row in rows(result) if row["status"] == "finished"]
    tabs = css(driver, "[role=tab]")
    assert [tab.get_attribute("data-cost") for tab in tabs] == list(COSTS)
    for tab in tabs:
        tab.click()
        cost = tab.get_attribute("data-cost")
        assert tab.get_attribute("aria-selected") == "true"
        assert len(css(driver, "[role=tab][aria-selected=true]")) == 1
        assert len(css(driver, "#scatter g.point")) == len(finished)
        on = {point.get_attribute("data-method") for point in css(driver, "#scatter g.point.on")}
        assert on == {row["method"] for row in finished if row["pareto"][cost]}
        assert len(css(driver, "#scatter path.front-line")) == 1
        boxes = driver.execute_script(
            "return [...document.querySelectorAll('#scatter text.label')].map((t) => {"
            "const b = t.getBoundingClientRect(); return [b.left, b.top + 2, b.right, b.bottom - 2]})"
        )
        assert len(boxes) >= 10
        assert not [
            (a, b) for i, a in enumerate(boxes) for b in boxes[:i]
            if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
        ]  # fmt: skip

    point = css(driver, "#scatter g.point[data-method='Prompt tuning n=20']")[0]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    point.click()
    assert point.get_attribute("aria-pressed") == "true"
    assert "Prompt tuning n=20" in css(driver, "#scatter .tip")[0].text
    assert css(driver, "#details h3")[0].text == "Prompt tuning n=20"
    settings = dict(
        zip([d.text for d in css(driver, "#settings dt")], [d.text for d in css(driver, "#settings dd")], strict=True)
    )
    assert settings == {"method": "prompt", "n": "20", "init": "vocabulary", "learning_rate": "0.03"}
    folded = [item.get_attribute("textContent") for item in css(driver, "#details details dt")]
    assert folded == ["epochs", "batch"]  # the same for every method
    runs = [row.text.split() for row in css(driver, "#details .runs tbody tr")]
    cells = [cell for cell in result.cells if cell.method == "Prompt tuning n=20"]
    assert [run[:2] for run in runs] == [[str(c.seed), f"{100 * c.metrics['accuracy']:.1f}"] for c in cells]
    assert [row.get_attribute("data-method") for row in css(driver, "#results tr.selected")] == ["Prompt tuning n=20"]
    strong = css(driver, "#curves g.run.strong")
    assert {run.get_attribute("data-method") for run in strong} == {"Prompt tuning n=20"}
    assert not problems(driver)
    asked = [url for url in requests(driver) if not url.startswith(("file:", "data:"))]
    assert not asked


def test_a_row_selects_too_and_a_failed_one_says_why(page, open_report):
    driver = open_report(page)
    click(driver, "#results tr.failed button[data-method='GaLore r=64']")
    assert css(driver, "#details h3")[0].text == "GaLore r=64"
    assert "out of memory" in css(driver, "#details .runs")[0].text
    click(driver, "#results tr:not(.failed) button[data-method='VeRA r=256']")
    assert "d_initial" in css(driver, "#settings")[0].text
    assert [p.get_attribute("data-method") for p in css(driver, "g.point.selected")] == ["VeRA r=256"]


def test_keyboard_reaches_tabs_and_points(page, open_report):
    driver = open_report(page)
    driver.execute_script("document.querySelector('[role=tab]').focus()")
    driver.switch_to.active_element.send_keys("\ue014")  # right arrow
    chosen = css(driver, "[role=tab][aria-selected=true]")[0]
    assert chosen.get_attribute("data-cost") == "peak_memory_bytes"
    driver.execute_script("document.querySelector(\"g.point[data-method='BitFit']\").focus()")
    assert "BitFit" in css(driver, "#scatter .tip")[0].text
    assert driver.switch_to.active_element.get_attribute("aria-label").startswith("BitFit: accuracy ")
    driver.switch_to.active_element.send_keys("\ue007")  # enter
    assert css(driver, "#details h3")[0].text == "BitFit"


def test_curves_switch_key_scale_and_methods(page, open_report):
    driver = open_report(page)
    assert len(css(driver, "#curves g.run")) == len(METHODS)
    assert len(css(driver, "#curves g.run path.seed")) == 3 * len(METHODS)
    before = css(driver, "#curves path.curve")[0].get_attribute("d")
    click(driver, "#curve-controls [data-value=log]")
    assert css(driver, "#curves path.curve")[0].get_attribute("d") != before
    click(driver, "#curve-controls [data-value=accuracy]")
    assert "accuracy during training" in css(driver, "#curves svg")[0].get_attribute("aria-label")
    click(driver, "#curve-legend .chip[data-method='LoRA r=8']")
    shown = {run.get_attribute("data-method") for run in css(driver, "#curves g.run")}
    assert shown == {method[0] for method in METHODS} - {"LoRA r=8"}
    click(driver, "#curve-legend button:nth-child(2)")
    assert "No curve is switched on" in css(driver, "#curves")[0].text
    assert not problems(driver)


def test_labels_with_markup_do_nothing(result, open_report, tmp_path):
    cells = [dataclasses.replace(c, method=EVIL, kind=EVIL) if c.method == "BitFit" else c for c in result.cells]
    cells = [dataclasses.replace(c, error=EVIL) if c.error else c for c in cells]
    settings = {"where": EVIL, EVIL: [1, EVIL]}
    cells = [dataclasses.replace(c, settings=settings) if c.method == EVIL else c for c in cells]
    evil = dataclasses.replace(result, title=EVIL, model=EVIL, data=EVIL, notes=[EVIL], recipe=settings, cells=cells)
    driver = open_report(write_html(evil, tmp_path / "evil.html"))
    click(driver, f"button.method[data-method='{EVIL}']")
    assert css(driver, "#details h3")[0].text == EVIL
    assert css(driver, "h1")[0].text == EVIL
    assert driver.execute_script("return window.injected ?? null") is None
    assert not css(driver, "img")
    assert len(css(driver, "script")) == 2
    assert not problems(driver)


@pytest.mark.parametrize("width", [320, 768, 1280])
@pytest.mark.parametrize("which", ["all", "one run", "all failed"])
def test_no_width_needs_sideways_scrolling(which, width, result, open_report, tmp_path):
    kept = {"all": result.cells, "one run": result.cells[:1], "all failed": [c for c in result.cells if c.error]}
    driver = open_report(
        write_html(dataclasses.replace(result, cells=kept[which]), tmp_path / "r.html"), width=width, dark=width == 768
    )
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert css(driver, "#results")
    if which == "all failed":
        assert "nothing to plot" in css(driver, "#scatter")[0].text
    assert not problems(driver)


def test_the_page_is_one_file_without_addresses(page):
    text = page.read_text("utf-8")
    outside = set(re.findall(r"https?://[^\"' )]+", text))
    assert outside == {"http://www.w3.org/2000/svg"}  # the name of a namespace, which nobody fetches
    assert "default-src 'none'" in text
    assert not re.search(r"<(link|script|img)[^>]*\b(src|href)=\"(?!data:)", text)


def test_embedded_data_cannot_end_its_element():
    data = {"a": "</script><!-- \u2028 &", "b": [1.5, None]}
    text = embed(data)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == data


def test_a_mean_curve_covers_what_all_seeds_cover():
    even, odd = [(0, 0.0), (2, 2.0), (4, 4.0)], [(1, 3.0), (3, 5.0), (5, 7.0)]
    assert mean_curve([even, odd]) == [(1, 2.0), (2, 3.0), (3, 4.0), (4, 5.0)]
    assert mean_curve([even, [(7, 1.0)]]) == even
    long = [(step, float(step)) for step in range(5_000)]
    assert len(thin(long)) == 400
    assert (thin(long)[0], thin(long)[-1]) == (long[0], long[-1])


def test_curves_leave_out_what_is_no_number(result):
    odd = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"loss": 1.0}, {"step": 3, "loss": None}]
    cells = [dataclasses.replace(result.cells[0], curve=[*odd, {"step": 4, "accuracy": 0.5, "note": "text"}])]
    found = curves(dataclasses.replace(result, cells=cells))
    assert found == {
        "loss": {"Full fine-tuning": {"mean": [(1, 2.0)], "seeds": {}}},
        "accuracy": {"Full fine-tuning": {"mean": [(4, 0.5)], "seeds": {}}},
    }


def test_the_verdict_names_the_best_and_the_cheapest_near_it(result):
    tiles = payload(result, {})["verdict"]
    assert [tile["method"] for tile in tiles] == [
        "Full fine-tuning",
        "DoRA r=8",
        "Pfeiffer adapter",
        "Pfeiffer adapter",
    ]
    best = next(row for row in rows(result) if row["method"] == "Full fine-tuning")["metrics"]["accuracy"]["mean"]
    near = [r for r in rows(result) if r["n"] and r["metrics"]["accuracy"]["mean"] >= 0.99 * best]
    assert tiles[1]["method"] == min(near, key=lambda row: row["adapter_parameters"])["method"]
