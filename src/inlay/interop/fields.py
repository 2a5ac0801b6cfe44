"""What each field of a PEFT configuration means to inlay: it is read, it has no effect, or it is refused and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inlay.core.errors import CheckpointError
from inlay.core.options import coerce

Names = list[str] | str | None


@dataclass(frozen=True)
class Field:
    """One field of `adapter_config.json`."""

    name: str
    use: Literal["read", "no effect", "refused"]
    kind: Any = Any
    default: Any = None
    """What PEFT takes when the field is missing; a refused field at this value is harmless."""
    required: bool = False
    why: str = ""


def read(name: str, kind: Any, default: Any = None, why: str = "") -> Field:
    return Field(name, "read", kind, default, why=why)


def need(name: str, kind: Any, why: str = "") -> Field:
    return Field(name, "read", kind, required=True, why=why)


def idle(name: str, why: str) -> Field:
    return Field(name, "no effect", why=why)


def refuse(name: str, why: str, harmless: Any = None) -> Field:
    return Field(name, "refused", default=harmless, why=why)


COMMON = (
    need("peft_type", str),
    idle("task_type", "the model is given, not made"),
    idle("auto_mapping", "the model is given, not made"),
    idle("base_model_name_or_path", "the model is given; the shapes of its tensors are checked"),
    idle("revision", "the model is given"),
    idle("peft_version", "the layout is the same in all of them"),
    idle("inference_mode", "attached adapters can be trained; the model keeps its mode"),
)
SAVED = read("modules_to_save", list[str] | None, why="trained copies beside the method: the head, or Full")
TARGETS = (
    need("target_modules", Names, why="names, endings of names, a regular expression or 'all-linear'"),
    read("exclude_modules", Names),
    SAVED,
)
LAYERS = (
    read("layers_to_transform", list[int] | int | None),
    read("layers_pattern", Names),
)
STORED_TRANSPOSED = idle("fan_in_fan_out", "the module's type tells how it stores its weight")


def check(config: dict[str, Any], fields: Sequence[Field], path: Path) -> dict[str, Any]:
    """The fields that are read, in their types and with PEFT's defaults.

    Raises:
        CheckpointError: a field is missing, has the wrong type, or asks for what inlay cannot do.
    """
    known = {field.name: field for field in fields}
    for name, value in config.items():
        if name not in known and not nothing(value):
            raise CheckpointError(
                f"{path}: inlay does not know the field '{name}' (here {value!r}): it may change what the adapter "
                "computes, so the folder is refused"
            )
    values = {}
    for field in fields:
        if field.required and field.name not in config:
            raise CheckpointError(f"{path} lacks the field '{field.name}': the folder is incomplete")
        value = config.get(field.name, field.default)
        if field.use == "refused" and value != field.default and not nothing(value):
            raise CheckpointError(f"{path}: '{field.name}' = {value!r} cannot be read: {field.why}")
        if field.use == "read":
            try:
                values[field.name] = coerce(value, field.kind)
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{path}: '{field.name}' {error}, got {value!r}") from None
    return values


def nothing(value: Any) -> bool:
    """Whether a field's value asks for nothing."""
    return value is None or value is False or value == [] or value == {} or value == ""
