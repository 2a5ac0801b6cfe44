"""Prepared rows as torch data sets, and their collation into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from inlay.data.chat import IGNORED
from inlay.data.choices import spread_out
from inlay.data.rows import Rows

Item = dict[str, Tensor]


class TokenRows(Dataset[Item]):
    """Token sequences held as one flat int32 tensor per field, with one label per row or per token."""

    def __init__(self, sequences: Mapping[str, Sequence[Sequence[int]]], labels: Sequence[float] | None) -> None:
        rows = sequences["input_ids"]
        self._ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        self._flat = {
            name: torch.tensor([token for row in values for token in row], dtype=torch.int32)
            for name, values in sequences.items()
        }
        self._labels = None if labels is None else torch.tensor(labels)  # whole numbers: int64; else float32

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._ends[index], self._ends[index + 1]
        item = {name: flat[start:end].long() for name, flat in self._flat.items()}
        return item if self._labels is None else {**item, "labels": self._labels[index]}

    @property
    def lengths(self) -> list[int]:
        """Tokens per row."""
        return self._ends.diff().tolist()


class ImageTensors(Dataset[Item]):
    """Images through the processor, float32 [channels, height, width]; kept once made while they fit in `budget`."""

    def __init__(self, rows: Rows, processor: Any, options: Mapping[str, Any], budget: int = 1 << 30) -> None:
        self._rows, self._processor, self._options, self._left = rows, processor, options, budget
        self._made: dict[int, Tensor] = {}
        self._labels = rows.column("label")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pixels = self._made.get(index)
        if pixels is None:
            pixels = self._processor(self._rows[index]["image"], return_tensors="pt", **self._options)["pixel_values"][
                0
            ]
            if pixels.nbytes <= self._left:
                self._left -= pixels.nbytes
                self._made[index] = pixels
        return {"pixel_values": pixels, "labels": torch.tensor(self._labels[index])}


@dataclass(frozen=True)
class Collate:
    """Stack items; pad sequences on the right to the longest, rounded up to a multiple, and add the attention mask.

    Attributes:
        pad_id: input id of padding.
        multiple_of: 8 lets tensor cores work on whole tiles.
        constant: tensors that are part of every batch as they are (class prompts).
    """

    pad_id: int = 0
    multiple_of: int = 1
    constant: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, items: Sequence[Item]) -> Item:
        """A batch as the model's keyword arguments."""
        if "parts" in items[0]:
            items = spread_out(items)
        lengths = [len(item["input_ids"]) for item in items if "input_ids" in item]
        longest = -(-max(lengths, default=0) // self.multiple_of) * self.multiple_of
        fill = {"input_ids": self.pad_id, "labels": IGNORED}
        batch = {}
        for name, first in items[0].items():
            values = [item[name] for item in items]
            if lengths and first.dim() == 1:
                batch[name] = first.new_full((len(items), longest), fill.get(name, 0))
                for row, value in zip(batch[name], values, strict=True):
                    row[: len(value)] = value
            else:
                batch[name] = torch.stack(values)
        if lengths:
            batch["attention_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        return batch | dict(self.constant)
