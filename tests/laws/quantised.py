"""Quantised linear layers. Two are honest ones of our own, int8 with a scale and an offset per row: a tensor that
stands for its numbers, as torchao's do, and a module that keeps codes in buffers. The others are the library's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.affine import AffineLinear
from inlay.models.quantise import NF4Linear
from laws.benches import Bench, Slot, vectors


def encode(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in) in int8, scale and offset (out, 1): W ≈ scale · (codes − offset)."""
    low, high = W.amin(1, keepdim=True), W.amax(1, keepdim=True)
    scale = (high - low).clamp_min(1e-8) / 255
    offset = -128 - low / scale
    return (W / scale + offset).round().clamp(-128, 127).to(torch.int8), scale, offset


def decode(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return scale * (codes.to(scale.dtype) - offset)


class Int8Tensor(torch.Tensor):
    """A matrix kept as int8 codes; of all functions it knows `linear`, `dequantize` and moving about."""

    codes: Tensor
    scale: Tensor
    offset: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, offset: Tensor) -> Int8Tensor:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)
        made.codes, made.scale, made.offset = codes, scale, offset
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale", "offset"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], context: None, size: Any, stride: Any) -> Int8Tensor:
        return cls(**parts)

    def dequantize(self) -> Tensor:
        return decode(self.codes, self.scale, self.offset)

    def __repr__(self, **kwargs: Any) -> str:
        return f"Int8Tensor{tuple(self.shape)}"

    def __deepcopy__(self, memo: dict) -> Int8Tensor:
        return nn.Parameter(Int8Tensor(self.codes.clone(), self.scale.clone(), self.offset.clone()), False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, w, *bias = args
            return F.linear(x, w.dequantize().to(x.dtype), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default):
            old = args[0]
            return Int8Tensor(old.codes, old.scale, old.offset)
        if func is torch.ops.aten._to_copy.default:
            old, dtype = args[0], (kwargs or {}).get("dtype")
            return Int8Tensor(old.codes, old.scale.to(dtype), old.offset.to(dtype))
        raise NotImplementedError(f"Int8Tensor: {func}")


class Int8Linear(nn.Module):
    """x Wᵀ + b with W in int8 buffers."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = of.in_features, of.out_features
        for name, t in zip(("codes", "scale", "offset"), encode(of.weight.detach()), strict=True):
            self.register_buffer(name, t)
        self.bias = of.bias

    def dequantize(self) -> Tensor:
        return decode(self.codes, self.scale, self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)


def of_int8(layer: nn.Linear) -> nn.Linear:
    """The layer with an `Int8Tensor` for its weight."""
    layer.weight = nn.Parameter(Int8Tensor(*encode(layer.weight.detach())), requires_grad=False)
    return layer


STORED = {"int8-tensor": of_int8, "int8-module": Int8Linear, "nf4": NF4Linear,
          "int4": lambda layer: AffineLinear(layer, bits=4, groups=2), "int8": AffineLinear}  # fmt: skip
"""Two that are written here, and inlay's own."""


class Packed(nn.Module):
    """A residual network whose two large layers are quantised."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down = (STORED[kind](layer) for layer in (nn.Linear(8, 12), nn.Linear(12, 8)))
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.down(F.gelu(self.up(x))))


@dataclass(frozen=True)
class PackedSlot(Slot):
    """W as the quantised layer gives it; written by putting an ordinary linear layer in its place."""

    def matrix(self, model: nn.Module) -> Tensor:
        module = self.module(model)
        return (module.weight if isinstance(module, nn.Linear) else module).dequantize().detach().double()

    @torch.no_grad()
    def put(self, model: nn.Module, W: Tensor, b: Tensor | None) -> None:
        old = self.module(model)
        dtype = model.get_submodule("out").weight.dtype
        made = nn.Linear(W.shape[1], W.shape[0]).to(dtype)
        made.weight.copy_(W)
        made.bias.copy_(old.bias if b is None else b)
        setattr(model, self.path, made)


def benches() -> list[Bench]:
    slots = (PackedSlot("up"), PackedSlot("down"))
    found = [
        Bench(kind, lambda kind=kind: Packed(kind), vectors(4, 3, 8), slots, ("up", "down"), ("up", "down"),
              quantised=True, grids=kind == "int4")
        for kind in STORED if kind != "int8"
    ]  # fmt: skip
    # int8 is int4 with other numbers to all methods but those that train its tensors
    return [*found, Bench("int8", lambda: Packed("int8"), vectors(4, 3, 8), quantised=True, grids=True)]
