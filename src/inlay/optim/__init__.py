"""Optimising an adapter: AdamW whose groups carry what every method says about its own tensors."""

from inlay.optim.adamw import AdamW
from inlay.optim.groups import optimizer

__all__ = ["AdamW", "optimizer"]
