"""PEFT's BEFT: offsets added to the outputs of linear layers, which are biases trained by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from inlay.core.errors import CheckpointError
from inlay.core.method import Method
from inlay.core.mount import Level
from inlay.interop.family import Family, Part, Reading, Writing, cannot
from inlay.interop.fields import COMMON, SAVED, Field, Names, idle, need
from inlay.interop.matching import saved_modules
from inlay.methods.weight.bitfit import BitFit


class BeftFamily(Family):
    peft_type: ClassVar[str] = "BEFT"
    note: ClassVar[str] = "BitFit of linear layers alone: PEFT keeps what was added to a bias, inlay the bias"
    fields: ClassVar[tuple[Field, ...]] = (
        *COMMON, SAVED, need("target_modules", Names), idle("init_weights", "the tensors are in the folder"),
    )  # fmt: skip

    def takes(self, method: Method) -> bool:
        return isinstance(method, BitFit)

    def read(self, reading: Reading) -> list[Part]:
        spec, paths, parts = BitFit(), reading.targets(), list[Part]()
        for path in paths:
            module = reading.model.get_submodule(path)
            if not isinstance(module, nn.Linear) or module.bias is None:
                raise CheckpointError(
                    f"{reading.folder}: '{path}' cannot be read: it is no linear layer with a bias, which the trained "
                    "offset could join"
                )
        found = {site.key: site for site in reading.finder.sites(spec, [""], reading.dtype)}
        for path in paths:
            offset, site = reading.take(f"{path}.beft_bias").flatten(), found[f"{path}.bias"]
            parts.append(Part(spec, site, {"value": site.parameter.detach().to(offset) + offset}))
        for part in parts:
            part.site.peers = [other.site for other in parts]
        return parts

    def write(self, writing: Writing, levels: Sequence[Level]) -> None:
        inside = saved_modules(writing.model, writing.saved)
        for level in levels:
            site = level.site
            if not isinstance(site.module, nn.Linear) or site.param != "bias":
                raise cannot(
                    f"PEFT has no BitFit; its BEFT trains biases of nn.Linear alone, '{site.key}' is one of "
                    f"{type(site.module).__name__}"
                )
            if site.ties:
                raise cannot(f"'{site.key}' is also the bias of '{site.ties[0][0]}', which PEFT's BEFT would leave")
            offset = level.method.get_parameter("value") - site.parameter
            writing.tensors[f"{site.path}.beft_bias"] = offset[None]
        paths = [level.site.path for level in levels if level.site.path not in inside]
        writing.config |= {"target_modules": writing.targets(paths), "init_weights": True}
        writing.adapted += paths
