"""Optimiser groups: every tensor at the rate of the method that owns it, LoRA+ ratios, and what decays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from inlay.core.adapter import Adapter
from inlay.core.errors import OptionError
from inlay.core.head import Head
from inlay.core.method import DeltaMethod, Method
from inlay.recipe import Recipe, Settings


def optimiser(adapter: Adapter, recipe: Settings) -> torch.optim.AdamW:
    """AdamW over the adapter's tensors; a group's `peak` is its rate before the schedule, in its `unit`."""
    heads = [level.method for level in adapter.levels if isinstance(level.method, Head)]
    units = {id(p): head.unit for head in heads for p in head.parameters()}
    groups: list[dict[str, Any]] = []
    for (rate, decay), parameters in grouped(adapter, recipe).items():
        for unit in dict.fromkeys(units.get(id(p), 1.0) for p in parameters):
            chosen = [p for p in parameters if units.get(id(p), 1.0) == unit]
            groups.append({"params": chosen, "lr": rate, "peak": rate, "unit": unit, "weight_decay": decay / unit})
    if not groups:
        raise OptionError("nothing would be trained: the method has no tensors here, and no task head was found")
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)


def grouped(adapter: Adapter, recipe: Settings) -> dict[tuple[float, float], list[nn.Parameter]]:
    """Trained tensors by (peak rate, weight decay).

    The rate is the recipe's, else that of the method which owns the tensor (of VeRA for the vectors inside a
    `DoRA(of=VeRA())`). A head has the recipe's head rate, else the recipe's rate, else its own. Vectors do not decay.
    LoRA+ (Hayou et al. 2024, arXiv 2402.12354) multiplies the rate of B-like tensors, see `is_fast`.
    """
    head = head_rate([p.method for p in adapter.placements], recipe)
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    fast = 0
    for level in adapter.levels:
        for owner, name, p in owned(level.method):
            if isinstance(owner, Head):
                rate = head
            else:
                rate = first_given(recipe.learning_rate, owner.learning_rate)
                if recipe.lora_plus is not None and is_fast(owner, name, p):
                    rate, fast = rate * recipe.lora_plus, fast + 1
            decay = recipe.weight_decay if p.dim() > 1 else 0.0
            found.setdefault((rate, decay), []).append(p)
    if recipe.lora_plus is not None and not fast:
        raise OptionError("lora_plus sets the rate of B in an update B A, but no method of the recipe has one")
    return found


def head_rate(methods: Sequence[Method], recipe: Settings) -> float:
    """Peak rate of the task head beside these methods; where it is all that is trained, the method's own."""
    alone = not any(method.has_sites for method in methods)
    own = methods[0].learning_rate if alone else Head.learning_rate
    return first_given(recipe.head_learning_rate, recipe.learning_rate, own)


def rates(recipe: Recipe) -> tuple[float | dict[str, float], float]:
    """(peak rate, by method where they differ; that of the head) that a recipe comes to."""
    whole = [part for method in recipe.methods() for part in [p.method for p in method.beside()] or [method]]
    parts = [m for method in whole for m in method.modules() if isinstance(m, Method)]
    own = {type(m).__name__: m.learning_rate for m in parts}
    rate = recipe.learning_rate if recipe.learning_rate is not None else own
    if isinstance(rate, dict) and len(set(rate.values())) == 1:
        rate = next(iter(rate.values()))
    return rate, head_rate(recipe.methods(), recipe)


def owned(method: Method) -> Iterator[tuple[Method, str, nn.Parameter]]:
    """(innermost method, name in it, tensor) of every trained tensor, each once."""
    for path, p in method.named_parameters():
        owner, prefix = method, ""
        parts = path.split(".")
        for i in range(1, len(parts)):
            inner = method.get_submodule(".".join(parts[:i]))
            if isinstance(inner, Method):
                owner, prefix = inner, ".".join(parts[:i]) + "."
        yield owner, path.removeprefix(prefix), p


def is_fast(owner: Method, name: str, p: nn.Parameter) -> bool:
    """LoRA+'s fast group: B, and vectors, of methods with a structured update."""
    return isinstance(owner, DeltaMethod) and (name == "B" or p.dim() == 1)


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


def first_given(*values: Any) -> Any:
    return next(value for value in values if value is not None)
