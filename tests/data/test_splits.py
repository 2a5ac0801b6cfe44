"""Splits and subsamples: proportions, sizes, determinism, and what must not lie on two sides."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from inlay.data.rows import TextRows
from inlay.data.splits import hold_out, quotas, shuffled, strata, subsample


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(0, 100), st.integers(0, 3))
def test_subsample_is_proportional_and_exact(groups, count, seed):
    chosen = subsample(groups, count, seed)
    assert len(chosen) == min(count, len(groups))
    assert chosen == sorted(set(chosen)) == subsample(groups, count, seed)
    for group, size in Counter(groups).items():
        share = sum(groups[i] == group for i in chosen)
        assert abs(share - len(chosen) * size / len(groups)) < 1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=20, max_size=120))
def test_hold_out_deals_every_row_once_and_keeps_keys_together(rows):
    groups, keys = zip(*rows, strict=True)
    parts = hold_out(groups, keys, {"validation": 5, "test": 5}, seed=0)
    assert sorted(i for part in parts.values() for i in part) == list(range(len(rows)))
    assert len(parts["validation"]) <= 5
    assert len(parts["test"]) <= 5
    sides = {}
    for name, indices in parts.items():
        for i in indices:
            assert sides.setdefault(keys[i], name) == name


def test_order_is_the_same_everywhere():
    """Written down: a split must not change with a library or platform."""
    assert shuffled(8, 0) == [0, 6, 4, 2, 5, 3, 7, 1]
    assert shuffled(8, 1) != shuffled(8, 0)


def test_quotas():
    assert quotas({"a": 2, "b": 1}, 4) == {"a": 3, "b": 1}
    assert sum(quotas({"a": 1, "b": 1, "c": 1}, 100).values()) == 100


def test_scores_are_split_by_fifths():
    rows = TextRows([{"text": str(i), "label": float(i % 10)} for i in range(50)])
    assert sorted(Counter(strata(rows, "regression")).values()) == [10] * 5
