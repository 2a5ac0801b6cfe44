"""How a model stands while it is trained: its dropout, its running statistics, its activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from inlay.train.state import TrainError


def norms_with_statistics(model: nn.Module) -> Iterator[nn.Module]:
    """BatchNorm layers of the base: their running statistics are frozen with it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not name.startswith("inlay."):
            yield module


def set_training(model: nn.Module, base_dropout: bool) -> None:
    """Training mode: the adapters' always, the base's only for its dropout."""
    model.train(base_dropout)
    model.get_submodule("inlay").train()
    for module in norms_with_statistics(model):
        module.eval()


def checkpointing(model: Any, on: bool) -> None:
    """Switch transformers' activation checkpointing."""
    if not on:
        model.gradient_checkpointing_disable()
    elif not model.supports_gradient_checkpointing:
        raise TrainError(f"{type(model).__name__} has no gradient checkpointing: leave gradient_checkpointing off")
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
