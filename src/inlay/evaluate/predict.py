"""Metrics of a split, batch by batch, without gradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core.choices import Scores
from inlay.data.chat import IGNORED
from inlay.evaluate.metrics import classification, regression

if TYPE_CHECKING:
    from inlay.work import Work


@dataclass(frozen=True)
class Output:
    """Loss (mean over rows, or over answer tokens) and logits of a batch."""

    loss: Tensor
    logits: Tensor


class Source(ABC):
    """Where batches come from and what computes them: the model itself, or its head on cached features."""

    @abstractmethod
    def prepare(self, split: str) -> None:
        """Do what is to be done once before the rows of a split are gone through."""

    @abstractmethod
    def batch(self, split: str, indices: list[int]) -> dict[str, Tensor]:
        """Rows of a split as a batch on the device."""

    @abstractmethod
    def forward(self, batch: dict[str, Tensor]) -> Output:
        """Loss and logits of a batch."""


@dataclass(frozen=True)
class Unkept(Source):
    """Rows as they are, each time anew."""

    work: Work

    def prepare(self, split: str) -> None:
        return

    def batch(self, split: str, indices: list[int]) -> dict[str, Tensor]:
        return self.work.batch(split, indices)


class Whole(Unkept):
    """The whole model."""

    def forward(self, batch: dict[str, Tensor]) -> Output:
        with self.work.computing():
            out = self.work.model(**batch)
        return Output(out.loss, out.logits)


class ByWords(Unkept):
    """A dual encoder as a classifier: an image's logits are its likeness to the text of every class."""

    def forward(self, batch: dict[str, Tensor]) -> Output:
        with self.work.computing():
            out = self.work.model(**{name: t for name, t in batch.items() if name != "labels"})
        return Output(of_the_right_class(out, batch), out.logits_per_image)


def of_the_right_class(out: Any, batch: dict[str, Tensor]) -> Tensor:
    """The cross-entropy of a dual encoder's output against the batch's labels."""
    return nn.functional.cross_entropy(out.logits_per_image.float(), batch["labels"])


def whole(work: Work) -> Source:
    """The whole model on the task."""
    return Whole(work) if work.prepared.prompt is None else ByWords(work)


@torch.no_grad()
def measure(source: Source, work: Work, split: str, size: int) -> dict[str, float]:
    """The metrics of the task on every row of a split, `size` rows at a time; the model is left in evaluation mode."""
    work.model.eval()
    lengths = work.lengths(split)
    rows = list(range(len(work.rows(split))))
    if lengths is not None:
        rows.sort(key=lengths.__getitem__)  # rows of one length together: less padding
    if work.task == "causal-lm":
        return language(source, split, rows, size)
    predicted, truth = [], []
    for start in range(0, len(rows), size):
        batch = source.batch(split, rows[start : start + size])
        logits = source.forward(batch).logits.float()
        truth.append(batch["labels"].cpu())
        predicted.append((logits.squeeze(-1) if work.task == "regression" else logits.argmax(-1)).cpu())
    compute = regression if work.task == "regression" else classification
    return compute(torch.cat(predicted), torch.cat(truth))


def language(source: Source, split: str, rows: list[int], size: int) -> dict[str, float]:
    """Mean loss per answer token, its exponential, and the share of answer tokens guessed from those before.

    Where there are answers to choose from, also the share of rows whose right one has the largest mean log-likelihood.
    """
    loss = right = tokens = 0.0
    chosen: list[Tensor] = []
    for start in range(0, len(rows), size):
        batch = source.batch(split, rows[start : start + size])
        choices = batch.pop("choices", None)
        out, labels = source.forward(batch), batch["labels"][:, 1:]
        if choices is not None:
            chosen.append(Scores(out.logits, batch["input_ids"], batch["labels"], choices).chosen())
        counted = labels != IGNORED
        count = float(counted.sum())
        loss += float(out.loss) * count
        right += float(((out.logits[:, :-1].argmax(-1) == labels) & counted).sum())
        tokens += count
    mean = loss / tokens
    found = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "token_accuracy": right / tokens}
    return found | ({"choice_accuracy": float(torch.cat(chosen).double().mean())} if chosen else {})


def elements(batch: dict[str, Tensor], task: str) -> int:
    """How many terms a batch's mean loss averages: rows, or answer tokens that have a token before them."""
    if task == "causal-lm":
        return int((batch["labels"][:, 1:] != IGNORED).sum())
    return len(batch["labels"])
