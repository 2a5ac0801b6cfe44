"""Reading the data in a pickle without running it."""

import pickle
from collections import OrderedDict

import pytest

from inlay.data.pickled import plain


class Holder:
    def __init__(self):
        self.rows = [["a", "b"], ["a"]]
        self.table = {"x": 1, "y": 70000, "z": (1.5, None, True)}
        self.counts = OrderedDict(a=2)
        self.again = self.rows


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code in the pickle was run",))


def test_objects_become_dicts():
    assert plain(pickle.dumps(Holder(), protocol=2)) == {
        "rows": [["a", "b"], ["a"]],
        "table": {"x": 1, "y": 70000, "z": (1.5, None, True)},
        "counts": {"a": 2},
        "again": [["a", "b"], ["a"]],
    }


def test_nothing_is_called():
    assert plain(pickle.dumps([Bomb(), "after"], protocol=2)) == [{}, "after"]


def test_other_instructions_are_refused():
    with pytest.raises(ValueError, match="is not about plain data"):
        plain(pickle.dumps({1, 2}, protocol=4))
