"""One table of several comparisons."""

from test_report_aggregate import cell, result

from inlay.report import across
from inlay.report.across import ranks
from inlay.report.aggregate import rows


def test_equal_means_share_their_rank():
    made = result([cell(m, metrics={"accuracy": a}) for m, a in (("A", 0.5), ("B", 0.9), ("C", 0.9), ("D", 0.7))])
    assert ranks(made, rows(made)) == {"B": 1.5, "C": 1.5, "D": 3.0, "A": 4.0}


def test_methods_in_order_of_their_mean_rank_and_dashes_where_they_did_not_run():
    first = result([cell("A", metrics={"accuracy": 0.5}), cell("B", metrics={"accuracy": 0.9})])
    second = result(
        [cell("A", metrics={"loss": 1.5}), cell("C", metrics={"loss": 2.0}), cell("B", error="no place", metrics={})],
        metric="loss", metrics=["loss"], lower_is_better=["loss"],
    )  # fmt: skip
    lines = [line.split("|")[1:-1] for line in across([first, second]).splitlines()]
    table = {line[0].strip(): [text.strip() for text in line[1:4]] for line in lines[2:]}
    assert list(table) == ["B", "A", "C"]
    assert table["B"] == ["25%", "**90.0**", "–"]
    assert table["A"] == ["50%", "50.0", "**1.500**"]
    assert table["C"] == ["75%", "–", "2.000"]
