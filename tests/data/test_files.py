"""One's own files: kinds, columns, tasks, splits, and every error with its row."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import inlay.data
from inlay.data import DataError


def rows(n=30, **extra):
    return [{"text": f"text number {i}", "label": ["no", "yes"][i % 2], **extra} for i in range(n)]


def csv_of(path, content, delimiter=","):
    columns = list(content[0])
    lines = [delimiter.join(columns), *(delimiter.join(str(r[c]) for c in columns) for r in content)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_csv(tmp_path):
    data = inlay.data.load(csv_of(tmp_path / "a.csv", rows()))
    assert data.task == "text-classification"
    assert data.labels == ["no", "yes"]
    assert {split: len(r) for split, r in data.splits.items()} == {"train": 24, "validation": 3, "test": 3}
    assert "Made here from the training rows: validation (3 rows) and test (3 rows)." in data.note
    row = data.splits["train"][0]
    assert row["text"].startswith("text number")
    assert row["label"] == int(row["text"].split()[-1]) % 2
    again = inlay.data.load(tmp_path / "a.csv")
    assert again.fingerprint == data.fingerprint
    assert inlay.data.load(tmp_path / "a.csv", seed=1).fingerprint != data.fingerprint


def test_documents_are_a_text_alone_where_asked_for(tmp_path):
    path = csv_of(tmp_path / "a.csv", [{"text": f"document {i}"} for i in range(9)])
    data = inlay.data.load(path, task="causal-lm")
    assert data.task == "causal-lm"
    assert set(data.splits["train"][0]) == {"text"}
    with pytest.raises(DataError, match="No task fits"):
        inlay.data.load(path)


def test_tsv_jsonl_and_parquet_read_alike(tmp_path):
    csv_of(tmp_path / "a.tsv", rows(), "\t")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows()) + "\n\n")
    pq.write_table(pa.Table.from_pylist(rows()), tmp_path / "a.parquet")
    prints = {inlay.data.load(tmp_path / f"a.{kind}").fingerprint for kind in ("tsv", "jsonl", "parquet")}
    assert len(prints) == 1


def test_quoted_cells_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    lines = "".join(f'"one, ""two""\nthree {i}",{i % 2}\n' for i in range(12))
    path.write_bytes(b"\xef\xbb\xbftext,label\n" + lines.encode())
    data = inlay.data.load(path)
    assert data.splits["train"][0]["text"].startswith('one, "two"\nthree')
    assert data.labels == ["0", "1"]


def test_folder_of_splits(tmp_path):
    for name, n in (("train-00000-of-00002", 10), ("train-00001-of-00002", 12), ("valid", 4), ("test", 6)):
        csv_of(tmp_path / f"{name}.csv", rows(n))
    data = inlay.data.load(tmp_path)
    assert {split: len(r) for split, r in data.splits.items()} == {"train": 22, "validation": 4, "test": 6}
    assert data.note == ""


def test_columns_are_mapped(tmp_path):
    path = csv_of(tmp_path / "a.csv", [{"q": f"why {i}", "kind": f"k{i % 3}", "text": "unused"} for i in range(20)])
    data = inlay.data.load(path, columns={"text": "q", "label": "kind"})
    assert data.splits["train"][0]["text"].startswith("why")
    assert data.labels == ["k0", "k1", "k2"]


def test_pairs_and_scores(tmp_path):
    content = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i / 4} for i in range(20)]
    data = inlay.data.load(csv_of(tmp_path / "a.csv", content))
    assert data.task == "regression"
    assert data.labels is None
    assert set(data.splits["train"][0]) == {"text", "text2", "label"}
    whole = inlay.data.load(tmp_path / "a.csv", task="text-classification")
    assert len(whole.labels) == 20


def test_prompt_answer_and_input(tmp_path):
    content = [
        {"instruction": f"Do {i}", "input": "x" if i % 2 else "", "output": f"done {i}", "system": "Be brief"}
        for i in range(20)
    ]
    data = inlay.data.load(csv_of(tmp_path / "a.csv", content))
    assert data.task == "causal-lm"
    messages = next(r["messages"] for r in data.splits["train"] if r["messages"][-1]["content"] == "done 3")
    assert messages == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Do 3\n\nx"},
        {"role": "assistant", "content": "done 3"},
    ]


def test_messages(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": turns, "id": i}) for i in range(12)))
    data = inlay.data.load(tmp_path / "a.jsonl")
    assert data.task == "causal-lm"
    assert data.splits["test"][0] == {"messages": turns}, "all questions are equal, and there is a test split"


def test_numbers_as_classes_sort_by_value(tmp_path):
    data = inlay.data.load(csv_of(tmp_path / "a.csv", [{"text": f"t{i}", "label": i % 12} for i in range(60)]))
    assert data.labels == [str(i) for i in range(12)]


def test_image_folder(tmp_path):
    for split in ("train", "test"):
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(10):
                Image.new("L", (9, 7), 40 * k + i).save(tmp_path / split / name / f"{i}.png")
    data = inlay.data.load(tmp_path)
    assert data.task == "image-classification"
    assert data.labels == ["cat", "dog"]
    assert {split: len(r) for split, r in data.splits.items()} == {"train": 18, "validation": 2, "test": 20}
    row = data.splits["test"][19]
    assert (row["image"].mode, row["image"].size, row["label"]) == ("RGB", (9, 7), 1)
    assert row["image"].getpixel((0, 0)) == (49, 49, 49)
    assert len(data.splits["test"][5:9]) == 4


def test_images_in_a_table(tmp_path):
    for i in range(12):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    content = [{"image": f"{i}.png", "label": "ab"[i % 2]} for i in range(12)]
    assert inlay.data.load(csv_of(tmp_path / "a.csv", content)).splits["train"][0]["image"].size == (4, 4)
    csv_of(tmp_path / "b.csv", [*content, {"image": "absent.png", "label": "a"}])
    with pytest.raises(DataError, match=r"b\.csv, line 14: there is no image file"):
        inlay.data.load(tmp_path / "b.csv")


def test_undecodable_image(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            (tmp_path / name / f"{i}.png").write_bytes(b"no picture")
    data = inlay.data.load(tmp_path)
    with pytest.raises(DataError, match=r"\.png cannot be decoded"):
        data.splits["train"][0]


def test_saved_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])})
    content = [{"text": f"t{i}", "label": i % 2} for i in range(20)]
    hidden = [{"text": f"h{i}", "label": -1} for i in range(5)]
    datasets.DatasetDict(
        train=datasets.Dataset.from_list(content, features=features),
        test=datasets.Dataset.from_list(hidden, features=features),
        unsupervised=datasets.Dataset.from_list(content, features=features),
    ).save_to_disk(tmp_path / "saved")
    data = inlay.data.load(tmp_path / "saved")
    assert data.labels == ["b", "a"]
    assert all(r["label"] == int(r["text"][1:]) % 2 for r in data.splits["train"])
    assert "Splits left out: unsupervised." in data.note
    assert "The test split has no labels and is left out." in data.note
    single = datasets.Dataset.from_list(content, features=features)
    single.to_parquet(tmp_path / "a.parquet")
    assert inlay.data.load(tmp_path / "a.parquet").labels == ["b", "a"]


def test_limit(tmp_path):
    path = csv_of(tmp_path / "a.csv", rows(100))
    data = inlay.data.load(path, limit={"train": 20, "test": 4})
    assert {split: len(r) for split, r in data.splits.items()} == {"train": 20, "validation": 10, "test": 4}
    assert sum(data.splits["train"].column("label")) == 10
    assert len(inlay.data.load(path, limit=5).splits["validation"]) == 5
    with pytest.raises(DataError, match="limit names a split 'dev'"):
        inlay.data.load(path, limit={"dev": 1})
    with pytest.raises(DataError, match="at least 1"):
        inlay.data.load(path, limit=0)


BAD = {
    "empty": ("", r"a\.csv is empty"),
    "header only": ("text,label\n", r"a\.csv is empty"),
    "cells": ("text,label\na,1\nb, c,0\n", r"a\.csv, line 3: 3 cells where the header has 2 columns \(text, label\)"),
    "no label": ("text,other\na,1\nb,0\n", r"No task fits\. The columns are text, other\."),
    "missing label": ("text,label\na,x\nb,\nc,y\n", r"a\.csv, line 3: the label is missing"),
    "missing text": ("text,label\na,x\n ,y\n", r"a\.csv, line 3: 'text' holds no text"),
    "single class": ("text,label\na,x\nb,x\n", r"column 'label' has a single class, 'x'"),
    "twice": ("text,label,label\na,x,y\n", r"the header has column 'label' more than once"),
    "quote": ('text,label\n"a"b,x\n', r"a\.csv, line 2: "),
    "few": ("text,label\na,x\nb,y\n", r"2 training rows are too few"),
    "choice": ("text,labels,class\na,x,y\n", r"Columns labels and class could each be label"),
    "tasks": ("text,label,prompt,answer\na,x,y,z\n", r"Several tasks fit: text-classification, causal-lm"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_csv(tmp_path, case):
    content, message = BAD[case]
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        inlay.data.load(tmp_path / "a.csv")


def test_bad_scores(tmp_path):
    for value in ("high", "nan", "inf", ""):
        csv_of(tmp_path / "a.csv", [{"text": f"t{i}", "label": 0.5 * i} for i in range(20)])
        with open(tmp_path / "a.csv", "a") as file:
            file.write(f"last,{value}\n")
        with pytest.raises(DataError, match=r"line 22: the label .* is not a finite number"):
            inlay.data.load(tmp_path / "a.csv", task="regression")


def test_nan_label_in_parquet(tmp_path):
    content = [{"text": f"t{i}", "label": float("nan") if i == 4 else float(i % 2)} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 5: the label is missing \(nan\)"):
        inlay.data.load(tmp_path / "a.parquet")


def test_whole_numbers_of_many_values_need_a_task(tmp_path):
    path = csv_of(tmp_path / "a.csv", [{"text": f"t{i}", "label": i} for i in range(150)])
    with pytest.raises(DataError, match=r"150 different whole numbers: say task="):
        inlay.data.load(path)
    assert inlay.data.load(path, task="regression").task == "regression"


def test_not_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\ngood,x\ncaf\xe9,y\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv, line 3: not UTF-8 \(byte 0xe9\)"):
        inlay.data.load(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"a\.jsonl, line 2: not JSON"),
        ("[1]", r"line 2: not a JSON object"),
        ('{"messages": "hi"}', r"line 2: messages must be a list"),
        ('{"messages": [{"role": "robot", "content": "hi"}]}', r"line 2: messages must be .*; one turn is"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', r"line 2: messages must be .*; it has none"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    good = {"messages": [{"role": "assistant", "content": "hello"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        inlay.data.load(tmp_path / "a.jsonl")


def test_bad_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="not a Parquet file"):
        inlay.data.load(tmp_path / "a.parquet")


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="holds no data"):
        inlay.data.load(tmp_path)
    csv_of(tmp_path / "first.csv", rows())
    csv_of(tmp_path / "second.csv", rows())
    with pytest.raises(DataError, match=r"first\.csv: which split is this"):
        inlay.data.load(tmp_path)


def test_splits_that_do_not_match(tmp_path):
    csv_of(tmp_path / "train.csv", rows())
    csv_of(tmp_path / "test.csv", [{"text": "t", "label": "perhaps"}])
    with pytest.raises(DataError, match=r"test\.csv, line 2: the class 'perhaps' does not occur in the training"):
        inlay.data.load(tmp_path)
    csv_of(tmp_path / "test.csv", [{"text": "t", "gold": "yes"}])
    with pytest.raises(DataError, match=r"test\.csv has no column 'label'; its columns are text, gold"):
        inlay.data.load(tmp_path)
    csv_of(tmp_path / "test.csv", rows())
    (tmp_path / "train.csv").unlink()
    with pytest.raises(DataError, match="no training split, only test"):
        inlay.data.load(tmp_path)


def test_bad_arguments(tmp_path):
    path = csv_of(tmp_path / "a.csv", rows())
    with pytest.raises(
        DataError, match=r"No column 'txet' for text; the columns are text, label\. Did you mean 'text'"
    ):
        inlay.data.load(path, columns={"text": "txet"})
    with pytest.raises(DataError, match="Unknown field 'txt' in columns; known: text"):
        inlay.data.load(path, columns={"txt": "text"})
    with pytest.raises(DataError, match="Unknown task 'sorting'; known: text-classification"):
        inlay.data.load(path, task="sorting")
    with pytest.raises(
        DataError, match=r"needs a column for messages, or prompt and answer, or text alone\. The columns"
    ):
        inlay.data.load(csv_of(tmp_path / "b.csv", [{"left": "a", "right": "b"}]), task="causal-lm")
    with pytest.raises(DataError, match="image-classification needs a column for image"):
        inlay.data.load(path, task="image-classification")
    (tmp_path / "a.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match="unknown kind of file"):
        inlay.data.load(tmp_path / "a.xlsx")


def test_unknown_name(monkeypatch):
    with pytest.raises(DataError, match=r"No data set 'no/such/file\.csv'.*\(trec, "):
        inlay.data.load("no/such/file.csv")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"No data set 'trek'.*Did you mean trec\?"):
        inlay.data.load("trek")
