"""Flags from typed fields: every field of a recipe is `--field value`, read as YAML reads it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from typing import Any, get_args, get_origin

from inlay.core.errors import OptionError
from inlay.core.options import Option, options
from inlay.recipe import CompareRecipe, parse_value

PREFIX = "field:"


def add_fields(parser: argparse.ArgumentParser, cls: type, only: Collection[str] | None = None) -> None:
    """One flag per field of a recipe class, or for some of them alone."""
    group = parser.add_argument_group("recipe fields")
    for opt in options(cls).values():
        if only is not None and opt.name not in only:
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
    """The fields that flags set, in their types; `a,b` is a list and `a=1,b=2` a mapping where one is wanted."""
    known = options(cls)
    given = {}
    for key, text in vars(args).items():
        if key.startswith(PREFIX) and text is not None:
            name = key.removeprefix(PREFIX)
            given[name] = read_value(text, known[name])
    return given


def recipe_fields(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """`given_fields`, with the options of `--set` given to the method."""
    given = given_fields(args, cls)
    if args.set:
        if cls is CompareRecipe:
            raise OptionError("--set is for one method: give options in the rows of the recipe")
        named = given.get("method", [])  # a flag that takes lists is read as one
        if len(named) != 1 or not isinstance(named[0], str):
            raise OptionError("--set gives options to --method: name one method there")
        given["method"] = with_options(named[0], args.set)
    return given


def with_options(method: str, pairs: list[str]) -> Any:
    """A method named on the command line, with the options of `--set`."""
    given = assignments(pairs)
    if not given:
        return method
    if "(" in method:
        raise OptionError("give options either in the call or with --set, not both")
    return {"method": method, **given}


def read_value(text: str, opt: Option) -> Any:
    """A flag's text in the option's type."""
    bare = not text.lstrip().startswith(("[", "{"))
    if wants(opt.type, list) and bare:
        item = str if wants_strings(opt.type) else None
        return [part.strip() if item else parse_value(part) for part in split_outside(text)]
    if wants(opt.type, dict) and bare and "=" in text:
        return assignments(split_outside(text), f"--{opt.name.replace('_', '-')}")
    return text if opt.type is str else parse_value(text)


def assignments(pairs: list[str], flag: str = "--set") -> dict[str, Any]:
    """`["r=8", "of=vera(r=256)"]` as a mapping; calls stay text for the method parser."""
    given: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"{flag} takes name=value, got '{pair}'")
        if name in given:
            raise OptionError(f"{flag} gives '{name}' twice")
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
