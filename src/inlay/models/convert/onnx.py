"""Read the weights of an ONNX export of a torch model, without the onnx package.

An ONNX file is one protobuf message; the few fields needed here are named below with their numbers from `onnx.proto`
(ModelProto.graph = 7; GraphProto.node = 1, .initializer = 5; NodeProto.input = 1, .output = 2, .op_type = 4;
TensorProto.dims = 1, .data_type = 2, .name = 8, .raw_data = 9).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_FLOAT32 = 1


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value): an int for a varint, else the bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire in (1, 2, 5):
            size = {1: 8, 5: 4}.get(wire)
            if size is None:
                size, at = _varint(data, at)
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError(f"not an ONNX file: wire type {wire} at byte {at}")


def _all(data: memoryview, number: int) -> list[Any]:
    return [value for n, value in _fields(data) if n == number]


def _text(data: memoryview) -> str:
    return bytes(data).decode("utf-8")


def _dims(values: list[Any]) -> list[int]:
    """Dimensions, whether written one by one or packed into one field."""
    out: list[int] = []
    for value in values:
        if isinstance(value, int):
            out.append(value)
            continue
        at = 0
        while at < len(value):
            dim, at = _varint(value, at)
            out.append(dim)
    return out


def state_dict(content: bytes) -> dict[str, torch.Tensor]:
    """The float32 weights of an ONNX export under their torch names.

    Initializers keep their names, except the weights of linear layers: those are anonymous and transposed operands
    of a MatMul, and get their name from the bias of the Add that follows (`x.bias` -> `x.weight`).
    """
    (graph,) = _all(memoryview(content), 7)
    named: dict[str, torch.Tensor] = {}
    for tensor in _all(graph, 5):
        (kind,), (name,), raw = _all(tensor, 2), _all(tensor, 8), _all(tensor, 9)
        shape = _dims(_all(tensor, 1))
        if kind != _FLOAT32 or not raw or not shape:
            continue
        values = np.frombuffer(raw[0], dtype="<f4")
        if values.size != math.prod(shape):
            raise ValueError(f"{_text(name)}: {values.size} values for shape {shape}; the file is damaged")
        named[_text(name)] = torch.from_numpy(values.reshape(shape).copy())

    nodes = [(_text(_all(n, 4)[0]), *([_text(v) for v in _all(n, k)] for k in (1, 2))) for n in _all(graph, 1)]
    product = {outputs[0]: inputs[1] for op, inputs, outputs in nodes if op == "MatMul" and inputs[1] in named}
    for op, inputs, _ in nodes:
        bias = [i for i in inputs if i.endswith(".bias") and i in named]
        matrix = [product[i] for i in inputs if i in product]
        if op == "Add" and bias and matrix:
            named[bias[0].removesuffix("bias") + "weight"] = named[matrix[0]].T
    return {name: value for name, value in named.items() if not name.startswith("onnx::")}
