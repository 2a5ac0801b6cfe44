"""Metrics of adapters and plain models on data sets."""

from inlay.evaluate.metrics import LOWER_IS_BETTER, NAMES, PRIMARY, better
from inlay.evaluate.run import evaluate, open_adapter

__all__ = ["LOWER_IS_BETTER", "NAMES", "PRIMARY", "better", "evaluate", "open_adapter"]
