"""Quantised linear layers: weights stored in few bits that can give their dense matrix.

Known by what they offer: an `nn.Linear` whose weight is a tensor subclass with its own `dequantize()` (torchao), the
layers of bitsandbytes, and any module that is a `Quantised`. Methods act on their inputs and outputs and read W from
`dense`; the quantised numbers themselves are never touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Quantised(Protocol):
    """A linear layer x Wᵀ + b of any storage."""

    in_features: int
    out_features: int

    def dequantize(self) -> Tensor:
        """W (out_features, in_features), in the type it computes in."""


@runtime_checkable
class Storage(Quantised, Protocol):
    """One that can store another layer as itself."""

    def alike(self, layer: nn.Linear) -> nn.Module:
        """That layer in the same storage."""


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a quantised linear layer that can give its dense weight."""
    weight = module._parameters.get("weight")
    if weight is not None and (unpacks(weight) or maker(weight) == "bitsandbytes"):
        return isinstance(module, nn.Linear)
    kind: Any = type(module)
    return dequantises(kind) and isinstance(module, Quantised)


@cache
def dequantises(kind: Any) -> bool:
    """Whether a class has what a `Quantised` has; looking for it in every module would take a protocol long."""
    return any("dequantize" in vars(base) for base in kind.__mro__)


def unpacks(t: Tensor) -> bool:
    """Whether a tensor is a quantised one that can give its numbers."""
    return type(t).dequantize is not Tensor.dequantize


def maker(t: Tensor) -> str:
    """The package a tensor's class comes from."""
    return type(t).__module__.partition(".")[0]


def dense(module: nn.Module) -> Tensor:
    """W (out, in) of a quantised linear layer, as its forward uses it."""
    weight: Any = module._parameters.get("weight")
    if weight is None or not (unpacks(weight) or maker(weight) == "bitsandbytes"):
        assert isinstance(module, Quantised)
        return module.dequantize().detach()
    if maker(weight) != "bitsandbytes":
        return weight.detach().dequantize().to(weight.dtype)
    import bitsandbytes.functional as bits

    if type(weight).__name__ == "Params4bit":
        return bits.dequantize_4bit(weight.data, weight.quant_state).reshape(shape(module))
    state: Any = module.state  # filled by the first forward, which empties the weight's own
    codes, scales = (state.CB, state.SCB) if weight.CB is None else (weight.CB, weight.SCB)
    bias = module._parameters.get("bias")
    return bits.int8_vectorwise_dequant(codes, scales).to(torch.float16 if bias is None else bias.dtype)


def shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a quantised linear layer."""
    assert isinstance(module, nn.Linear | Quantised)
    return int(module.out_features), int(module.in_features)


def numbers(modules: Iterable[nn.Module]) -> int:
    """Numbers that modules hold themselves, tied tensors once; a quantised matrix counts as what it stands for."""
    total = 0
    held: dict[int, int] = {}
    for module in modules:
        packed = is_quantised(module)
        total += prod(shape(module)) if packed else 0
        own = {n: p for n, p in module._parameters.items() if p is not None}
        held |= {id(p): p.numel() for n, p in own.items() if n == "bias" or not packed}
    return total + sum(held.values())


def plain(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An ordinary linear layer with these tensors, in the mode of the quantised one."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made.train(module.training)


@contextmanager
def dense_layers(model: nn.Module) -> Iterator[None]:
    """The model with ordinary linear layers in the places of its quantised ones, for as long as the context lasts."""
    held = [(parent, name, m) for parent in model.modules() for name, m in parent._modules.items() if m is not None]
    held = [(parent, name, m) for parent, name, m in held if is_quantised(m)]
    for parent, name, module in held:
        parent._modules[name] = plain(module, dense(module), module._parameters.get("bias"))
    try:
        yield
    finally:
        for parent, name, module in held:
            parent._modules[name] = module
