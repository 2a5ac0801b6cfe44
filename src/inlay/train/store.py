"""Rows of different lengths as one flat tensor, in memory or in a file: where states of frozen layers are kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.core.files import tensor_bytes
from inlay.recipe import Settings

ON_DISK = 10
"""How many times as much as in memory may be kept on disk: reading it again costs little, holding it hurts nobody."""
FOLDER = "frozen"
"""Within a run's folder, while it goes on."""


class Unfit(Exception):  # noqa: N818  (a reason, no error)
    """Why nothing can be kept: a sentence for the user, and no error."""


class Pointless(Unfit):
    """Why nothing would be gained."""


@dataclass(frozen=True)
class Room:
    """Where and how much may be kept."""

    folder: Path = Path()
    cache: str = "memory"
    """As in a recipe: auto, memory or disk."""
    limit: float = float("inf")
    """GB in memory; on disk `ON_DISK` times as much."""
    dtype: torch.dtype | None = None
    """None: as it was computed."""

    @classmethod
    def of(cls, recipe: Settings, folder: Path) -> Room:
        """What a recipe allows."""
        dtype = torch.bfloat16 if recipe.cache_dtype == "bfloat16" else None
        return cls(folder, recipe.cache or "memory", recipe.cache_limit, dtype)

    def on_disk(self, size: int) -> bool:
        """Whether so many bytes go to the disk rather than into memory; Unfit where there is room in neither."""
        in_memory, on_disk = self.limit * 1e9, self.limit * 1e9 * ON_DISK
        if self.cache != "disk" and size <= in_memory:
            return False
        if self.cache == "memory" or size > on_disk:
            most = in_memory if self.cache == "memory" else on_disk
            raise Unfit(f"it would take {size / 1e9:.3g} GB, and cache_limit leaves {most / 1e9:.3g}")
        free = shutil.disk_usage(self.folder).free
        if 2 * size > free:
            raise Unfit(f"it would take {size / 1e9:.3g} GB of a disk that has {free / 1e9:.3g} left")
        return True


class Store:
    """`counts[i]` vectors (or whatever `item` is the shape of) for each row i, appended in any order of the rows.

    The whole is allocated at once. A file is written as it is appended to, and mapped into memory when it is complete,
    so that a full disk is an error and not a crash; it holds nothing but the numbers.
    """

    def __init__(self, counts: Sequence[int], item: torch.Size, dtype: torch.dtype, file: Path | None = None) -> None:
        self.counts = torch.tensor(counts, dtype=torch.long)
        self.begins = torch.full_like(self.counts, -1)
        self.item, self.dtype, self.file = item, dtype, file
        self.filled, self.total = 0, int(self.counts.sum())
        self.flat = torch.empty(0 if file else self.total, *item, dtype=dtype)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, rows: Sequence[int], values: Tensor) -> None:
        """The vectors of some rows, one row after the other; InlayError where the disk is full."""
        ends = self.counts[list(rows)].cumsum(0) + self.filled
        self.begins[list(rows)] = ends - self.counts[list(rows)]
        values = values.to("cpu", self.dtype)
        before, self.filled = self.filled, int(ends[-1])
        if self.file is None:
            self.flat[before : self.filled] = values
            return
        try:
            with self.file.open("ab" if before else "wb") as file:
                file.write(tensor_bytes(values))
        except OSError as error:
            raise InlayError(
                f"{self.file} could not be written ({error.strerror}): make room, or train with cache: off"
            ) from error
        if self.filled == self.total:
            size = self.total * self.item.numel()
            self.flat = torch.from_file(str(self.file), size=size, dtype=self.dtype).view(self.total, *self.item)

    def take(self, rows: Sequence[int]) -> Tensor:
        """The vectors of some rows, one row after the other."""
        counts = self.counts[list(rows)]
        shift = self.begins[list(rows)] - counts.cumsum(0) + counts
        return self.flat[torch.repeat_interleave(shift, counts) + torch.arange(int(counts.sum()))]


def clear(folder: Path) -> None:
    """Remove the files of stores from a run's folder, those that a killed process left included."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
