"""PEFT's LN_TUNING."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from inlay.core.levels import Level
from inlay.core.method import Method
from inlay.interop.family import Family, Part, Reading, Writing, cannot
from inlay.interop.fields import COMMON, TARGETS, Field
from inlay.interop.saved import changed_buffers, keys_in, read_module, stored
from inlay.methods.weight.bitfit import is_norm
from inlay.methods.weight.full import Full
from inlay.methods.weight.normtuning import NormTuning


class NormFamily(Family):
    peft_type: ClassVar[str] = "LN_TUNING"
    note: ClassVar[str] = "NormTuning on normalisation layers (Full where PEFT was pointed at other modules)"
    fields: ClassVar[tuple[Field, ...]] = (*COMMON, *TARGETS)

    def takes(self, method: Method) -> bool:
        return isinstance(method, NormTuning)

    def read(self, reading: Reading) -> list[Part]:
        parts = []
        for path in reading.targets():
            key = f"{path}.ln_tuning_layers"
            tuning = NormTuning(statistics="adapted" if changed_buffers(reading, path, key) else "frozen")
            method = tuning if is_norm(reading.model.get_submodule(path)) else Full()
            parts += read_module(reading, path, method, key)
        return parts

    def write(self, writing: Writing, levels: Sequence[Level]) -> None:
        trained = {level.site.key: level for level in levels}
        paths = list(dict.fromkeys(level.site.path for level in levels))
        for path in paths:
            if missing := set(keys_in(writing.model, path)) - set(trained):
                raise cannot(f"PEFT trains whole layers, '{sorted(missing)[0]}' is not trained")
            states = {
                name: t for level in levels if level.site.path == path for name, t in level.method.states().items()
            }
            for name, t in writing.model.get_submodule(path).state_dict().items():
                key = f"{path}.{name}"
                own = stored(trained[key]) if key in trained else states.get(name, t)
                writing.tensors[f"{path}.ln_tuning_layers.{name}"] = own
        writing.config["target_modules"] = writing.targets(paths)
