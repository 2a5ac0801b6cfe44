"""The base's own modules: all but `model.inlay`, whose tree grows with every adapter."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def base_modules(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """Every module of the base by path. The walk does not enter `model.inlay`: adapters do not make it longer."""
    inlay = model._modules.get("inlay")
    return dict(model.named_modules(set() if inlay is None else {inlay}, remove_duplicate=remove_duplicate))


def base_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The base's parameters, tied ones as often as they are held."""
    for module in base_modules(model).values():
        yield from (p for p in module._parameters.values() if p is not None)
