"""Flags from typed fields: every field of a recipe is `--field value`, read as YAML reads it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, get_args, get_origin

from inlay.core.errors import OptionError
from inlay.core.options import Option, options
from inlay.recipe import parse_value

PREFIX = "field:"


def add_fields(parser: argparse.ArgumentParser, cls: type, skip: tuple[str, ...] = ()) -> None:
    """One flag per field of a recipe class."""
    group = parser.add_argument_group("recipe fields")
    for opt in options(cls).values():
        if opt.name in skip:
            continue
        default = "required" if opt.default is dataclasses.MISSING else repr(opt.default)
        flag = {"nargs": "?", "const": "true"} if opt.type is bool else {}
        group.add_argument(
            "--" + opt.name.replace("_", "-"),
            dest=PREFIX + opt.name,
            metavar=opt.type_name.replace("%", "%%"),
            help=f"{opt.doc} (default {default})".replace("%", "%%"),
            **flag,  # type: ignore[arg-type]
        )


def given_fields(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields that flags set, in their types; `a,b` is a list where a list is wanted."""
    known = options(cls)
    given = {}
    for key, text in vars(args).items():
        if key.startswith(PREFIX) and text is not None:
            name = key.removeprefix(PREFIX)
            given[name] = read_value(text, known[name])
    return given


def read_value(text: str, opt: Option) -> Any:
    """A flag's text in the option's type."""
    if wants(opt.type, list) and not text.lstrip().startswith("["):
        item = str if wants_strings(opt.type) else None
        return [part.strip() if item else parse_value(part) for part in split_outside(text)]
    return text if opt.type is str else parse_value(text)


def assignments(pairs: list[str]) -> dict[str, Any]:
    """`["r=8", "of=vera(r=256)"]` as a mapping; calls stay text for the method parser."""
    given = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"--set takes option=value, got '{pair}'")
        given[name] = text if "(" in text else parse_value(text)
    return given


def wants(kind: Any, container: type) -> bool:
    """Whether a type is that container or a union with it."""
    return get_origin(kind) is container or any(get_origin(arm) is container for arm in get_args(kind))


def wants_strings(kind: Any) -> bool:
    lists = [kind] if get_origin(kind) is list else [arm for arm in get_args(kind) if get_origin(arm) is list]
    return any(arm is str or str in get_args(arm) for of in lists for arm in get_args(of))


def split_outside(text: str) -> list[str]:
    """Split at commas that stand outside brackets: `lora(r=8, alpha=16), vera` is two."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]
