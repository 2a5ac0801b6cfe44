"""Typed fields are the only source of a method's options: constructor, flags, recipe schema, docs and validation."""

from __future__ import annotations

import dataclasses
import math
import types
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from inlay.core.errors import OptionError, near


def option(*, doc: str, default: Any = dataclasses.MISSING, low: float | None = None, high: float | None = None) -> Any:
    """A typed field with its documentation and its inclusive range."""
    meta = {"doc": doc, "low": low, "high": high}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=meta)
    if isinstance(default, nn.Module):  # a default of the class would hide the instance's submodule
        return dataclasses.field(default_factory=lambda: default, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class Option:
    """One option as the command line, the recipes and the docs see it."""

    name: str
    type: Any
    default: Any
    doc: str
    low: float | None
    high: float | None

    @property
    def type_name(self) -> str:
        return describe(self.type)

    def check(self, owner: str, value: Any) -> Any:
        """The value in the option's type (an int is a float), or OptionError."""
        try:
            value = coerce(value, self.type)
        except (TypeError, ValueError) as error:
            raise OptionError(f"{owner}: option '{self.name}' {error}, got {value!r}") from None
        if isinstance(value, int | float) and not isinstance(value, bool):
            if isinstance(value, float) and not math.isfinite(value):
                raise OptionError(f"{owner}: option '{self.name}' must be finite, got {value!r}")
            if self.low is not None and value < self.low:
                raise OptionError(f"{owner}: option '{self.name}' must be at least {self.low}, got {value!r}")
            if self.high is not None and value > self.high:
                raise OptionError(f"{owner}: option '{self.name}' must be at most {self.high}, got {value!r}")
        return value


def options(cls: type) -> dict[str, Option]:
    """The options of a dataclass, in order of declaration."""
    hints = type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        meta = field.metadata
        found[field.name] = Option(
            field.name, hints[field.name], default, meta.get("doc", ""), meta.get("low"), meta.get("high")
        )
    return found


@cache
def type_hints(cls: type) -> dict[str, Any]:
    """The annotations of a class, evaluated once: every built copy of a method asks for its options several times."""
    return get_type_hints(cls)


def check_known(owner: str, given: dict[str, Any], known: dict[str, Option]) -> None:
    """OptionError naming every known option when `given` has another."""
    for name in given:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise OptionError(f"{owner} has no option '{name}'{near(name, known)} (its options: {listed})")


def coerce(value: Any, kind: Any) -> Any:
    """`value` as `kind`; raises TypeError saying what is expected."""
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin is Literal:
        if value not in get_args(kind):
            raise TypeError(f"must be one of {', '.join(map(repr, get_args(kind)))}")
        return value
    if origin in (Union, types.UnionType):
        for arm in get_args(kind):
            try:
                return coerce(value, arm)
            except (TypeError, ValueError):
                continue
        raise TypeError(f"must be {describe(kind)}")
    if origin in (list, tuple, set) or kind in (list, tuple):
        if isinstance(value, str) or not isinstance(value, list | tuple | set):
            raise TypeError(f"must be {describe(kind)}")
        arm = get_args(kind)[0] if get_args(kind) else Any
        return (origin or kind)(coerce(item, arm) for item in value)
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            raise TypeError("must be a mapping")
        key, item = get_args(kind) or (Any, Any)
        return {coerce(k, key): coerce(v, item) for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, bool):
        raise TypeError("must be int")
    if kind is None or kind is type(None):
        if value is not None:
            raise TypeError("must be null")
        return None
    if not isinstance(value, kind):
        raise TypeError(f"must be {describe(kind)}")
    return value


def describe(kind: Any) -> str:
    """A type as documentation prints it: `int`, `'a' | 'b'`, `list[str]`."""
    origin = get_origin(kind)
    if origin is Literal:
        return " | ".join(map(repr, get_args(kind)))
    if origin in (Union, types.UnionType):
        return " | ".join(describe(arm) for arm in get_args(kind))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(describe(arm) for arm in get_args(kind))}]"
    if kind is type(None):
        return "null"
    return getattr(kind, "__name__", str(kind))
