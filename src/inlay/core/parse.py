"""Method calls written as text: `lora`, `lora(r=16)`, `dora(of=vera(r=256))`."""

from __future__ import annotations

import ast
from typing import Any

from inlay.core.errors import OptionError


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """(name, options) of a method call; nested calls stay mappings. Only literals are read, nothing is evaluated."""
    try:
        tree = ast.parse(text.strip().replace("-", "_") if "(" not in text else text.strip(), mode="eval").body
    except SyntaxError:
        raise OptionError(f"cannot read the method '{text}': write a name, or a call such as 'lora(r=8)'") from None
    name, given = _read(tree, text)
    return name, given


def _read(node: ast.expr, text: str) -> tuple[str, dict[str, Any]]:
    if isinstance(node, ast.Name):
        return node.id, {}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        return node.func.id, {k.arg: _value(k.value, text) for k in node.keywords if k.arg}
    raise OptionError(f"cannot read the method '{text}': options are given by name, as in 'lora(r=8, alpha=16)'")


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call):
        name, given = _read(node, text)
        return {"method": name, **given}
    if isinstance(node, ast.Name):
        words = {"true": True, "false": False, "null": None, "none": None}
        return words.get(node.id.lower(), node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise OptionError(f"cannot read the option value '{ast.unparse(node)}' in '{text}'") from None
