"""The catalogue of methods as plain data: what the command line prints and the documentation is generated from."""

from __future__ import annotations

import inspect
from typing import Any

from inlay.core.method import REGISTRY, Method, method_class
from inlay.core.options import Option, options


def describe(cls: type[Method]) -> dict[str, Any]:
    """One method: name, site, paper, equation, options, where it goes, whether it merges."""
    text = inspect.getdoc(cls) or ""
    return {
        "name": cls.name(),
        "class": cls.__name__,
        "site": cls.kind,
        "paper": cls.paper,
        "equation": cls.equation(),
        "description": text.partition("\n")[2].strip(),
        "where": list(cls.where),
        "mergeable": cls.mergeable,
        "learning_rate": cls.learning_rate,
        "options": [describe_option(opt) for opt in options(cls).values()],
    }


def describe_option(opt: Option) -> dict[str, Any]:
    """One option as plain data; a method as default is its specification."""
    default = opt.default.specification() if isinstance(opt.default, Method) else opt.default
    return {
        "name": opt.name,
        "type": opt.type_name,
        "default": default,
        "low": opt.low,
        "high": opt.high,
        "doc": opt.doc,
    }


def catalogue(name: str | None = None) -> list[dict[str, Any]]:
    """Every method, or the one of that name, ordered by site and name."""
    if name is not None:
        return [describe(method_class(name))]
    return [describe(REGISTRY[name]) for name in names()]


def names() -> list[str]:
    """Every method's name, ordered by site and name."""
    import inlay.methods  # noqa: F401  (importing registers)

    return sorted(REGISTRY, key=lambda name: (REGISTRY[name].kind, name))
