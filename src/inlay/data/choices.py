"""Questions with several answers to choose from: rows for language models, and their layout in a batch.

A row is a chat with the right answer, `messages`, and the texts of the wrong ones, `wrong`. In a batch every answer is
a row of its own, as `inlay.core.choices` describes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from inlay.data.chat import IGNORED
from inlay.data.rows import DataError, Row, Rows, TextRows

Item = dict[str, Tensor]


# ---------------------------------------------------------------------- rows
def as_questions(rows: Rows, names: Sequence[str]) -> TextRows:
    """Texts with a class each as prompts whose answers are the names of the classes."""
    made: list[Row] = []
    for row in rows:
        prompt = "\n\n".join(row[field] for field in ("text", "text2") if field in row)
        right = names[row["label"]]
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": right}]
        made.append({"messages": turns, "wrong": [name for name in names if name != right]})
    return TextRows(made)


def wrong_ones(place: str, choices: object, answer: str) -> list[str]:
    """The wrong answers among all; DataError where they are no list of texts with another one than the right."""
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{place}: choices must be a list of texts; it is {choices!r:.80}.")
    wrong = [c for c in dict.fromkeys(choices) if c != answer]
    if not wrong:
        raise DataError(f"{place}: choices hold no other answer than the right one, {answer!r}.")
    return wrong


def chats_of(row: Row) -> list[list[dict[str, str]]]:
    """The chat with each answer, the right one first."""
    *before, right = row["messages"]
    return [[*before, {**right, "content": text}] for text in (right["content"], *row["wrong"])]


# ---------------------------------------------------------------------- items and batches
class ChoiceRows(Dataset[Item]):
    """Examples as token sequences, one for each answer and the right one first, with labels at the answers' tokens."""

    def __init__(self, examples: Sequence[Sequence[tuple[list[int], list[int]]]]) -> None:
        self._examples = [[(torch.tensor(ids), torch.tensor(labels)) for ids, labels in rows] for rows in examples]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Item:
        """`input_ids` and `labels` of all answers one after the other, and `parts`, their lengths."""
        rows = self._examples[index]
        ids, labels = (torch.cat(part) for part in zip(*rows, strict=True))
        return {"input_ids": ids, "labels": labels, "parts": torch.tensor([len(row) for row, _ in rows])}

    @property
    def lengths(self) -> list[int]:
        """Tokens per example, of all its answers."""
        return [sum(len(ids) for ids, _ in rows) for rows in self._examples]


def spread_out(items: Sequence[Item]) -> list[Item]:
    """The answers of several examples as rows of one batch."""
    rows = []
    for number, item in enumerate(items, 1):
        parts = item["parts"].tolist()
        for k, (ids, labels) in enumerate(zip(*(item[n].split(parts) for n in ("input_ids", "labels")), strict=True)):
            answer = labels != IGNORED
            right = labels if k == 0 else torch.full_like(labels, IGNORED)
            rows.append({"input_ids": ids, "labels": right, "choices": number * answer.long()})
    return rows
