"""PEFT's BEFT: offsets added to the outputs of linear layers, which are biases trained by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from inlay.core.errors import CheckpointError
from inlay.core.levels import Level
from inlay.core.method import Method
from inlay.interop.family import Family, Part, Reading, Writing, cannot
from inlay.interop.fields import COMMON, SAVED, Field, Names, idle, need
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
        spec, paths = BitFit(), reading.targets()
        for path in paths:
            if not takes_offset(reading.model, path):
                raise CheckpointError(
                    f"{reading.folder}: '{path}' cannot be read: it is no linear layer with a bias, which the trained "
                    "offset could join"
                )
        found = {site.key: site for site in reading.finder.sites(spec, [""], reading.dtype)}
        sites = [found[f"{path}.bias"] for path in paths]
        for site in sites:
            site.peers = sites
        offsets = [reading.take(f"{path}.beft_bias").flatten() for path in paths]
        return [
            Part(spec, site, {"value": site.parameter.detach().to(offset) + offset})
            for site, offset in zip(sites, offsets, strict=True)
        ]

    def write(self, writing: Writing, levels: Sequence[Level]) -> None:
        for level in levels:
            site = level.site
            if site.param != "bias" or not takes_offset(writing.model, site.path):
                raise cannot(
                    f"PEFT has no BitFit; its BEFT trains biases of nn.Linear alone, '{site.key}' is one of "
                    f"{type(site.module).__name__}"
                )
            if site.ties:
                raise cannot(f"'{site.key}' is also the bias of '{site.ties[0][0]}', which PEFT's BEFT would leave")
            writing.tensors[f"{site.path}.beft_bias"] = (level.method.get_parameter("value") - site.parameter)[None]
        paths = [level.site.path for level in levels]
        writing.config |= {"target_modules": writing.targets(paths), "init_weights": True}
        writing.adapted += paths


def takes_offset(model: nn.Module, path: str) -> bool:
    """Whether a module is a linear layer with a bias, which is called itself (one of nn.MultiheadAttention is not)."""
    module, parent = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    own = isinstance(module, nn.Linear) and not isinstance(parent, nn.MultiheadAttention)
    return own and module._parameters.get("bias") is not None
