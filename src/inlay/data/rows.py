"""Rows of a data set: plain dicts for text, images kept compact and decoded when a row is read."""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.core.errors import InlayError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Row = dict[str, Any]
TASKS = ("text-classification", "regression", "causal-lm", "image-classification")


class DataError(InlayError, ValueError):
    """A data set cannot be read, or does not fit the task."""


class Rows(Sequence[Row], ABC):
    """An ordered collection of rows that can be narrowed without decoding anything."""

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    @abstractmethod
    def take(self, indices: Sequence[int]) -> Rows:
        """The rows at `indices`, in that order."""

    @abstractmethod
    def relabelled(self, numbers: Sequence[int]) -> Rows:
        """The rows with class i as class `numbers[i]`."""

    @abstractmethod
    def column(self, field: str) -> list[Any]:
        """The values of one field (not `image`)."""

    @abstractmethod
    def keys(self) -> list[Hashable]:
        """For every row what it is about: rows with equal keys must not lie on two sides of a split."""

    @abstractmethod
    def contents(self) -> list[Hashable]:
        """For every row its input without the label: equal contents are the same example."""

    @abstractmethod
    def pieces(self) -> Iterator[bytes]:
        """The content, for the fingerprint."""


class TextRows(Rows):
    """Rows of plain dicts."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return TextRows(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def take(self, indices: Sequence[int]) -> TextRows:
        return TextRows([self._rows[i] for i in indices])

    def relabelled(self, numbers: Sequence[int]) -> TextRows:
        return TextRows([{**row, "label": numbers[row["label"]]} for row in self._rows])

    def column(self, field: str) -> list[Any]:
        return [row[field] for row in self._rows]

    def keys(self) -> list[Hashable]:
        """The text, or the question put to the assistant, whatever its case and spacing."""
        return [" ".join(_topic(row).casefold().split()) for row in self._rows]

    def contents(self) -> list[Hashable]:
        return [json.dumps({k: v for k, v in row.items() if k != "label"}, sort_keys=True) for row in self._rows]

    def pieces(self) -> Iterator[bytes]:
        for row in self._rows:
            yield json.dumps(row, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")


class ImageRows(Rows):
    """Images as encoded bytes, file paths, or one uint8 array [rows, height, width, 3]; decoded to RGB when read."""

    def __init__(
        self, images: Sequence[bytes | Path] | np.ndarray, labels: list[int], keys: list[Hashable] | None = None
    ) -> None:
        self._images, self._labels = images, labels
        self._keys: list[Hashable] = keys if keys is not None else [*range(len(labels))]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        return {"image": decode(self._images[index]), "label": self._labels[index]}

    def take(self, indices: Sequence[int]) -> ImageRows:
        chosen = [self._images[i] for i in indices] if isinstance(self._images, list) else self._images[list(indices)]  # type: ignore[call-overload]
        return ImageRows(chosen, [self._labels[i] for i in indices], [self._keys[i] for i in indices])

    def relabelled(self, numbers: Sequence[int]) -> ImageRows:
        return ImageRows(self._images, [numbers[label] for label in self._labels], self._keys)

    def column(self, field: str) -> list[Any]:
        assert field == "label", field  # the one field that is not an image
        return list(self._labels)

    def keys(self) -> list[Hashable]:
        return self._keys

    def contents(self) -> list[Hashable]:
        return [hashlib.sha256(content).digest() for content in self._bytes()]

    def pieces(self) -> Iterator[bytes]:
        for content, label in zip(self._bytes(), self._labels, strict=True):
            yield b"%d:" % label
            yield content

    def _bytes(self) -> Iterator[bytes]:
        return (image.read_bytes() if isinstance(image, Path) else bytes(image) for image in self._images)


def decode(image: bytes | Path | np.ndarray) -> Image:
    """An upright RGB picture; DataError if the bytes are no image."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not isinstance(image, bytes | Path):
        return Image.fromarray(image)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        name = str(image) if isinstance(image, Path) else f"an image of {len(image)} bytes"
        raise DataError(f"{name} cannot be decoded: {error}") from error


def _topic(row: Row) -> str:
    if "messages" in row:
        return "\n".join(m["content"] for m in row["messages"] if m["role"] == "user")
    return row["text"]


@dataclass(frozen=True)
class Data:
    """A data set ready for `prepare`.

    Attributes:
        name: what was asked for.
        task: one of `TASKS`. Rows are dicts: text classification {"text", "text2" (pairs), "label": int}; regression
            the same with a float; causal-lm {"messages": [{"role", "content"}, …]}, or {"text"} for whole documents;
            image classification {"image": RGB picture, "label": int}.
        splits: "train", "validation" and "test".
        labels: class names by label; None for the other tasks.
        note: where splits come from, what was left out, what to beware of.
        licence: as far as known; empty for one's own files.
        fingerprint: SHA-256 of the content of all splits, their order included.
    """

    name: str
    task: str
    splits: Mapping[str, Rows]
    labels: list[str] | None
    note: str
    licence: str
    fingerprint: str


def fingerprint(task: str, labels: list[str] | None, splits: Mapping[str, Rows]) -> str:
    """SHA-256 over everything a training run can see."""
    digest = hashlib.sha256(json.dumps([task, labels]).encode())
    for name, rows in splits.items():
        digest.update(f"\n{name} {len(rows)}\n".encode())
        for piece in rows.pieces():
            digest.update(b"%d\n" % len(piece))
            digest.update(piece)
    return digest.hexdigest()
