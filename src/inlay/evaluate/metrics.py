"""The metrics of each task, from predictions and truths as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

PRIMARY = {
    "text-classification": "accuracy",
    "image-classification": "accuracy",
    "regression": "pearson",
    "causal-lm": "loss",
}
"""The metric that selects adapters and heads tables, by task."""

NAMES = {
    "text-classification": ["accuracy", "macro_f1", "mcc"],
    "image-classification": ["accuracy", "macro_f1", "mcc"],
    "regression": ["pearson", "spearman", "mse"],
    "causal-lm": ["loss", "perplexity", "token_accuracy", "choice_accuracy"],
}
LOWER_IS_BETTER = ("loss", "perplexity", "mse")


def better(name: str, value: float, than: float | None) -> bool:
    """Whether `value` of a metric improves on `than` (anything improves on None)."""
    if than is None:
        return True
    return value < than if name in LOWER_IS_BETTER else value > than


def classification(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracy, F1 averaged over the classes that occur in either, and Matthews' correlation for many classes."""
    classes = int(max(predicted.max(), truth.max())) + 1
    confusion = torch.bincount(truth * classes + predicted, minlength=classes**2).view(classes, classes).double()
    right, true, guessed = confusion.diag(), confusion.sum(1), confusion.sum(0)
    occurs = true + guessed > 0
    f1 = 2 * right[occurs] / (true + guessed)[occurs]
    n = confusion.sum()
    spread = ((n * n - guessed @ guessed) * (n * n - true @ true)).sqrt()
    mcc = (n * right.sum() - true @ guessed) / spread if spread > 0 else torch.zeros(())
    return {"accuracy": float(right.sum() / n), "macro_f1": float(f1.mean()), "mcc": float(mcc)}


def regression(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Pearson's and Spearman's correlation (0 where one side is constant) and the mean squared error."""
    predicted, truth = predicted.double(), truth.double()
    return {
        "pearson": correlation(predicted, truth),
        "spearman": correlation(ranks(predicted), ranks(truth)),
        "mse": float((predicted - truth).square().mean()),
    }


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    spread = a.norm() * b.norm()
    return float(a @ b / spread) if spread > 0 else 0.0


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ties at the mean of theirs."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]
