"""The main tensor that goes into a module and the one that comes out, whatever the call looks like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def first(args: tuple, kwargs: dict) -> Tensor:
    """The first tensor argument of a call."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("inlay found no tensor among a module's arguments")


def replace_first(args: tuple, kwargs: dict, x: Tensor) -> tuple[tuple, dict]:
    """The same call with its first tensor argument replaced."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], x, *args[i + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, name: x}
    raise TypeError("inlay found no tensor among a module's arguments")


def first_output(output: Any) -> Tensor:
    """The main tensor of a module's output (tensor, tuple, or a mapping such as transformers' ModelOutput)."""
    if isinstance(output, Tensor):
        return output
    return output[0]


def replace_first_output(output: Any, y: Tensor) -> Any:
    """The same output with its main tensor replaced."""
    if isinstance(output, Tensor):
        return y
    if isinstance(output, dict):
        name = next(iter(output))
        return type(output)(**{**output, name: y})
    return type(output)((y, *output[1:]))


def some_rows(value: Any, rows: Tensor, batch: int) -> Any:
    """An argument for some rows of the batch: of every tensor with `batch` rows in it, those."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 0 and value.shape[0] == batch else value
    if type(value) in (tuple, list):
        return type(value)(some_rows(item, rows, batch) for item in value)
    if type(value) is dict:
        return {name: some_rows(item, rows, batch) for name, item in value.items()}
    return value


def with_rows(whole: Any, rows: Tensor, part: Any, batch: int) -> Any:
    """An output of `batch` rows in which some are those of `part`, whichever axis of a tensor they lie on."""
    if isinstance(whole, Tensor):
        if part.shape == whole.shape:
            return part.to(whole.dtype) if len(rows) == batch else whole
        axis = next(i for i, (n, m) in enumerate(zip(whole.shape, part.shape, strict=True)) if n != m)
        size = [len(rows) if i == axis else n for i, n in enumerate(whole.shape)]
        return whole.index_copy(axis, rows, part.to(whole.dtype).expand(size))
    if isinstance(whole, dict):
        return type(whole)(**{name: with_rows(value, rows, part[name], batch) for name, value in whole.items()})
    if type(whole) in (tuple, list):
        return type(whole)(with_rows(value, rows, p, batch) for value, p in zip(whole, part, strict=True))
    return whole


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Every tensor of a module's output, however deep in tuples, lists and mappings."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for item in output.values() if isinstance(output, dict) else output:
            yield from tensors_in(item)
