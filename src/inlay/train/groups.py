"""The optimiser of a recipe, and its rates over a run."""

from __future__ import annotations

import math

import torch

from inlay.core.adapter import Adapter
from inlay.core.companion import Companion
from inlay.core.errors import OptionError
from inlay.core.method import Method
from inlay.optim.adamw import AdamW
from inlay.optim.groups import head_rate, optimizer
from inlay.recipe import Recipe, Settings


def optimiser(adapter: Adapter, recipe: Settings) -> AdamW:
    """`inlay.optimizer` with a recipe's settings."""
    made = optimizer(
        adapter, recipe.learning_rate, rate_factor=recipe.rate_factor, head_learning_rate=recipe.head_learning_rate,
        weight_decay=recipe.weight_decay, lora_plus=recipe.lora_plus,
    )  # fmt: skip
    if made.per_layer:
        check_per_layer(recipe.accumulate, recipe.clip, ("accumulate: 1", "clip: null"))
    return made


def check_per_layer(accumulate: int, clip: float | None, wanted: tuple[str, str]) -> None:
    """OptionError where gradients that are used up within the backward pass would be needed after it."""
    said = "per_layer steps a tensor within the backward pass and frees its gradient"
    if accumulate > 1:
        raise OptionError(f"{said}, so none can be accumulated: {wanted[0]}, or leave per_layer off")
    if clip:
        raise OptionError(f"{said}, so their common norm cannot be clipped: {wanted[1]}, or leave per_layer off")


def rates(recipe: Recipe) -> tuple[float | dict[str, float], float]:
    """(peak rate, by method where they differ; that of the head) that a recipe comes to."""
    whole = [part for method in recipe.methods() for part in [p.method for p in method.beside()] or [method]]
    parts = [m for method in whole for m in method.modules() if isinstance(m, Method)]
    own = {type(m).__name__: m.learning_rate * recipe.rate_factor for m in parts if not isinstance(m, Companion)}
    rate = recipe.learning_rate if recipe.learning_rate is not None else own
    if isinstance(rate, dict) and len(set(rate.values())) == 1:
        rate = next(iter(rate.values()))
    return rate, head_rate(recipe.methods(), recipe.learning_rate, recipe.head_learning_rate)


def factor(schedule: str, warmup: float, step: int, total: int) -> float:
    """Share of the peak rate at `step` (from 0) of `total`: a linear rise, then the schedule's decay towards zero."""
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    left = (total - step) / max(1, total - rising)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> float:
    """Put every group at its share of its peak; returns the largest rate, each in its group's unit."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share * group["unit"]
    return max(group["peak"] * share for group in optimizer.param_groups)
