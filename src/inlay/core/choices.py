"""Answers to choose from in a batch of a causal language model, and what the model gives to each.

Every answer is a row of its own, with its prompt before it. Beside `input_ids`, `labels` (of right answers alone, so
that the model's own loss is that on them) and `attention_mask` there is `choices`, of the shape of `input_ids`: the
number of the question, from 1, at the tokens of its answers, and 0 elsewhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.positions import IGNORED


class Scores:
    """What a causal model gives to the answers of a batch.

    Attributes:
        likelihood: log p of every token (rows, tokens − 1), from its logits (rows, tokens, vocabulary).
        answer: which of them belong to an answer.
        example: the number of each row's example (rows,).
        right: whether a row is the right answer (rows,).
    """

    def __init__(self, logits: Tensor, ids: Tensor, labels: Tensor, choices: Tensor) -> None:
        nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        self.likelihood, self.answer = -nll, choices[:, 1:] > 0
        self.example, self.right = choices.amax(1), (labels[:, 1:] != IGNORED).any(1)

    def by_row(self, exponent: float = 1.0) -> Tensor:
        """log p of each answer over its number of tokens to some power (rows,)."""
        length = self.answer.sum(1).clamp_min(1)
        return (self.likelihood * self.answer).sum(1) / length**exponent

    def rivals(self) -> Tensor:
        """Which rows are answers to the same question (rows, rows), each its own rival as well."""
        return self.example[:, None] == self.example

    def chosen(self, exponent: float = 1.0) -> Tensor:
        """Whether the right answer of each example is strictly the best (examples,)."""
        score = self.by_row(exponent)
        others = self.rivals() & ~torch.eye(len(score), dtype=torch.bool, device=score.device)
        return (score > torch.where(others, score, -torch.inf).amax(1))[self.right]
