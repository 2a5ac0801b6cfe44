"""From the columns of a table to canonical rows: which column is what, which task that makes, and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from inlay.data.choices import as_questions, wrong_ones
from inlay.data.rows import TASKS, DataError, ImageRows, Row, Rows, TextRows


@dataclass(frozen=True)
class Table:
    """One split as read: where it came from, its rows by column name, and each row's number there.

    `classes` holds the class names of columns that store class numbers; `folder` is where image paths start.
    """

    origin: str
    columns: list[str]
    rows: list[dict[str, Any]]
    numbers: Sequence[int]
    unit: str
    classes: Mapping[str, list[str]]
    folder: Path | None = None

    def place(self, i: int) -> str:
        """Row `i` as a person would look for it."""
        return f"{self.origin}, {self.unit} {self.numbers[i]}"


# canonical field: other column names that are taken for it when the data set has no column of that name
ALIASES: dict[str, tuple[str, ...]] = {
    "text": ("sentence", "sentence1", "text1", "premise", "question1"),
    "text2": ("sentence2", "hypothesis", "question2"),
    "label": ("labels", "class", "category", "score"),
    "image": ("img",),
    "messages": ("conversation",),
    "prompt": ("instruction", "question"),
    "answer": ("output", "response", "completion"),
    "choices": ("options",),
    "input": (),
    "system": (),
}
_TEXT = {"text": True, "text2": False, "label": True}
FIELDS: dict[str, dict[str, bool]] = {  # by task: its fields, and whether they are required
    "text-classification": _TEXT,
    "regression": _TEXT,
    "image-classification": {"image": True, "label": True},
    "causal-lm": {"messages": True},
    "causal-lm from prompt and answer": {
        "prompt": True,
        "answer": True,
        "input": False,
        "system": False,
        "choices": False,
    },
    "causal-lm from documents": {"text": True},
    "causal-lm from classes": _TEXT,
}
# integers with more values than this are as likely scores as classes
_MOST_CLASSES = 100


def match(found: Sequence[str], asked: Mapping[str, str]) -> dict[str, str]:
    """Canonical field -> column, for every field that `asked` names or that the column names suggest."""
    for field, column in asked.items():
        if field not in ALIASES:
            raise DataError(f"Unknown field {field!r} in columns; known: {', '.join(ALIASES)}.")
        if column not in found:
            near = get_close_matches(column, found, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"No column {column!r} for {field}; the columns are {', '.join(found)}.{meant}")
    taken = dict(asked)
    for field, others in ALIASES.items():
        if field in taken:
            continue
        names = [field] if field in found else [name for name in others if name in found]
        names = [name for name in names if name not in taken.values()]
        if len(names) > 1:
            raise DataError(
                f"Columns {' and '.join(names)} could each be {field}; say which, as in "
                f"columns={{{field!r}: {names[0]!r}}}."
            )
        if names:
            taken[field] = names[0]
    return taken


def choose_task(fields: Mapping[str, str], found: Sequence[str], task: str | None) -> str:
    """The key in `FIELDS` to follow: for the asked task, or the only one that the fields allow."""
    if task is not None and task not in TASKS:
        raise DataError(f"Unknown task {task!r}; known: {', '.join(TASKS)}.")
    complete = [name for name, needs in FIELDS.items() if all(f in fields for f, required in needs.items() if required)]
    fitting = [name for name in complete if task is None or name.split(" ")[0] == task]
    if task is None and {"text-classification", "regression"} <= set(fitting):
        fitting.remove("regression")  # settled by the labels
    if "causal-lm from classes" in fitting and (task is None or len(fitting) > 2):
        fitting.remove("causal-lm from classes")  # text and label, and where it is asked for
    if "causal-lm" in fitting and "causal-lm from prompt and answer" in fitting:
        fitting.remove("causal-lm from prompt and answer")
    if "causal-lm from documents" in fitting and (task is None or len(fitting) > 1 or "label" in fields):
        fitting.remove("causal-lm from documents")  # text alone, and where it is asked for
    columns = f"The columns are {', '.join(found)}."
    if not fitting and task is not None:
        wanted = [f for f, required in FIELDS[task].items() if required and f not in fields]
        also = ", or prompt and answer, or text alone" if task == "causal-lm" else ""
        raise DataError(
            f"{task} needs a column for {' and '.join(wanted)}{also}. {columns} Say which is which with columns, as in "
            f"--columns {wanted[0]}={found[0]}"
        )
    if not fitting:
        raise DataError(
            f"No task fits. {columns} Known are text and label, text, text2 and label, image and label, messages, or "
            "prompt and answer; say which is which with columns, as in --columns text=question,label=kind"
        )
    if len(fitting) > 1:
        raise DataError(f"Several tasks fit: {', '.join(fitting)}. {columns} Say which with task=…")
    return fitting[0]


def rows_of(
    tables: Mapping[str, Table], asked: Mapping[str, str], task: str | None
) -> tuple[str, dict[str, Rows], list[str] | None]:
    """(task, splits, class names) of tables with the same columns."""
    first = next(iter(tables.values()))
    fields = match(first.columns, asked)
    kind = choose_task(fields, first.columns, task)
    used = {field: fields[field] for field in FIELDS[kind] if field in fields}
    for table in tables.values():
        missing = [column for column in used.values() if column not in table.columns]
        if missing:
            raise DataError(f"{table.origin} has no column {missing[0]!r}; its columns are {', '.join(table.columns)}.")
        if not table.rows:
            raise DataError(f"{table.origin} is empty: it has no rows.")
    asked_for = kind
    if kind == "causal-lm from classes":
        kind = "text-classification"
    if kind.startswith("causal-lm"):
        build = {"causal-lm": _chat, "causal-lm from documents": _texts}.get(kind, _answered)
        return "causal-lm", {s: TextRows(_build(t, used, build)) for s, t in tables.items()}, None
    column = used["label"]
    if kind == "text-classification" and task is None:
        kind = _classes_or_scores(tables, column)
    if kind == "regression":
        texts = {s: _build(t, used, _texts) for s, t in tables.items()}
        scores = {s: _scores(t, column) for s, t in tables.items()}
        return kind, {s: TextRows(_labelled(texts[s], scores[s])) for s in texts}, None
    labels, names = _class_numbers(tables, column)
    if kind == "image-classification":
        images = {s: [_image(t, i, used["image"]) for i in range(len(t.rows))] for s, t in tables.items()}
        return kind, {s: ImageRows(images[s], labels[s]) for s in images}, names
    texts = {s: _build(t, used, _texts) for s, t in tables.items()}
    rows: dict[str, Rows] = {s: TextRows(_labelled(texts[s], labels[s])) for s in texts}
    if asked_for != kind:
        return "causal-lm", {s: as_questions(r, names) for s, r in rows.items()}, None
    return kind, rows, names


def _build(table: Table, used: Mapping[str, str], build: Callable[[Table, int, Mapping[str, str]], Row]) -> list[Row]:
    return [build(table, i, used) for i in range(len(table.rows))]


def _labelled(rows: list[Row], labels: Sequence[float]) -> list[Row]:
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]


def _text(table: Table, i: int, column: str) -> str:
    value = table.rows[i][column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{table.place(i)}: {column!r} holds no text ({value!r}).")
    return value


def _texts(table: Table, i: int, used: Mapping[str, str]) -> Row:
    return {field: _text(table, i, used[field]) for field in ("text", "text2") if field in used}


def _answered(table: Table, i: int, used: Mapping[str, str]) -> Row:
    """A chat of one question and answer; `input`, where it is not empty, goes below the prompt."""
    optional = {f: table.rows[i][used[f]] for f in ("system", "input") if f in used and table.rows[i][used[f]]}
    prompt = "\n\n".join([_text(table, i, used["prompt"]), *([optional["input"]] if "input" in optional else [])])
    system = [{"role": "system", "content": optional["system"]}] if "system" in optional else []
    right = _text(table, i, used["answer"])
    row: Row = {"messages": [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": right}]}
    if "choices" in used:
        row["wrong"] = wrong_ones(table.place(i), table.rows[i][used["choices"]], right)
    return row


def _chat(table: Table, i: int, used: Mapping[str, str]) -> Row:
    messages = table.rows[i][used["messages"]]
    wrong = f"{table.place(i)}: messages must be a list of {{'role', 'content'}} with an assistant's turn"
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"{wrong}; it is {messages!r:.80}.")
    turns = [{"role": m.get("role"), "content": m.get("content")} for m in messages]
    for turn in turns:
        if turn["role"] not in ("system", "user", "assistant") or not isinstance(turn["content"], str):
            raise DataError(f"{wrong}; one turn is {turn!r:.80}.")
    if all(turn["role"] != "assistant" for turn in turns):
        raise DataError(f"{wrong}; it has none.")
    return {"messages": turns}


def _image(table: Table, i: int, column: str) -> bytes | Path:
    """Encoded bytes, a path (relative to the table's folder), or the {"bytes", "path"} of the datasets library."""
    value = table.rows[i][column]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise DataError(f"{table.place(i)}: {column!r} holds no image ({value!r:.80}).")
    path = (table.folder or Path()) / value
    if not path.is_file():
        raise DataError(f"{table.place(i)}: there is no image file {path}.")
    return path


def _absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _classes_or_scores(tables: Mapping[str, Table], column: str) -> str:
    if any(column in table.classes for table in tables.values()):
        return "text-classification"
    values = [row[column] for table in tables.values() for row in table.rows if not _absent(row[column])]
    numbers = [number for value in values if (number := _number(value)) is not None]
    if len(numbers) < len(values):
        return "text-classification"
    if any(not number.is_integer() for number in numbers):
        return "regression"
    if len(set(numbers)) > _MOST_CLASSES:
        raise DataError(
            f"Column {column!r} has {len(set(numbers))} different whole numbers: say task='text-classification' if "
            f"they are classes, task='regression' if they are scores."
        )
    return "text-classification"


def _scores(table: Table, column: str) -> list[float]:
    scores = []
    for i, row in enumerate(table.rows):
        number = None if _absent(row[column]) else _number(row[column])
        if number is None or not math.isfinite(number):
            raise DataError(f"{table.place(i)}: the label {row[column]!r} is not a finite number, as regression needs.")
        scores.append(number)
    return scores


def _class_numbers(tables: Mapping[str, Table], column: str) -> tuple[dict[str, list[int]], list[str]]:
    """Labels as numbers, and their names: as stored, or sorted (whole numbers by value)."""
    named: dict[str, list[str]] = {}
    for split, table in tables.items():
        classes = table.classes.get(column)
        named[split] = [_class_name(table, i, column, classes) for i in range(len(table.rows))]
    first = next(iter(tables.values()))
    names = first.classes.get(column) or _sorted_names({name for values in named.values() for name in values})
    if len(names) < 2:
        raise DataError(f"{first.origin}: column {column!r} has a single class, {names[0]!r}; at least two are needed.")
    if "train" in named:
        known = set(named["train"])
        for split, values in named.items():
            for i, name in enumerate(values):
                if name not in known:
                    raise DataError(
                        f"{tables[split].place(i)}: the class {name!r} does not occur in the training split."
                    )
    number = {name: i for i, name in enumerate(names)}
    return {split: [number[name] for name in values] for split, values in named.items()}, names


def _class_name(table: Table, i: int, column: str, classes: list[str] | None) -> str:
    value = table.rows[i][column]
    if _absent(value):
        raise DataError(f"{table.place(i)}: the label is missing ({value!r}).")
    if classes is not None:
        if not 0 <= value < len(classes):
            raise DataError(f"{table.place(i)}: the label {value} is outside the {len(classes)} classes of {column!r}.")
        return classes[value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _sorted_names(names: set[str]) -> list[str]:
    whole = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=int) if whole else sorted(names)
