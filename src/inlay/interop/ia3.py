"""PEFT's IA3."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.core.errors import CheckpointError
from inlay.core.hosts import ConvHost, LinearHost, TransposedHost
from inlay.core.levels import Level
from inlay.core.method import Method
from inlay.core.sites import Site
from inlay.interop.family import Family, Part, Reading, Writing, cannot
from inlay.interop.fields import COMMON, STORED_TRANSPOSED, TARGETS, Field, Names, idle, need
from inlay.methods.weight.ia3 import IA3


class IA3Family(Family):
    peft_type: ClassVar[str] = "IA3"
    note: ClassVar[str] = "IA3 on Linear, Conv1D and, scaling outputs, two- and three-dimensional convolutions"
    fields: ClassVar[tuple[Field, ...]] = (
        *COMMON, *TARGETS, STORED_TRANSPOSED,
        need("feedforward_modules", Names, "modules whose input is scaled"),
        idle("init_ia3_weights", "the tensors are in the folder"),
    )  # fmt: skip

    def takes(self, method: Method) -> bool:
        return isinstance(method, IA3)

    def read(self, reading: Reading) -> list[Part]:
        named, paths = reading.config["feedforward_modules"], reading.targets()
        on_input = [path for path in paths if feeds(named, path)]
        # names as they are where they mean the same here, else the very paths
        spec = IA3(feedforward=named if isinstance(named, list) else on_input)
        if any(spec.scales_input(s) != (p in on_input) for p, s in reading.sites(spec, paths).items()):
            spec = IA3(feedforward=on_input)
        parts = []
        for path, site in reading.sites(spec, paths).items():
            if path in on_input and isinstance(site.host, ConvHost):
                raise CheckpointError(
                    f"{reading.folder}: '{path}' cannot be read: inlay scales a convolution's output, not its input"
                )
            parts.append(Part(spec, site, {"l": reading.take(f"{path}.ia3_l").flatten()}))
        reading.adapted += paths
        return parts

    def write(self, writing: Writing, levels: Sequence[Level]) -> None:
        groups: dict[str, list[Level]] = {}
        for level in levels:
            groups.setdefault(level.site.path, []).append(level)
        on_input = []
        for path, group in groups.items():
            site, method = group[0].site, group[0].method
            assert isinstance(method, IA3)
            plain = type(site.host) in (LinearHost, TransposedHost)
            if not plain and not isinstance(site.module, nn.Conv2d | nn.Conv3d):
                raise cannot(
                    f"PEFT has IA3 on linear layers, Conv2d and Conv3d, '{path}' is {type(site.module).__name__}"
                )
            if method.on_input:
                if site.rows is not None or len(group) > 1:
                    raise cannot(f"'{path}' is a packed matrix whose parts scale their inputs apart")
                on_input.append(path)
            writing.tensors[f"{path}.ia3_l"] = vector(group) if not method.on_input else shaped(method.l, site, True)
        writing.config |= {
            "target_modules": writing.targets(list(groups)),
            "feedforward_modules": name_feedforward(list(groups), on_input),
            "init_ia3_weights": True,
            "fan_in_fan_out": any(type(level.site.host) is TransposedHost for level in levels),
        }
        writing.adapted += list(groups)
        named = writing.config["target_modules"]
        if isinstance(named, list) and not set(writing.config["feedforward_modules"]) <= set(named):
            writing.config["target_modules"] = "|".join(re.escape(path) for path in groups)


def feeds(named: list[str] | str | None, path: str) -> bool:
    """PEFT's rule: an expression for the whole path, or names it ends with (not necessarily after a dot)."""
    if isinstance(named, str):
        return re.fullmatch(named, path) is not None
    return any(path.endswith(name) for name in named or ())


def name_feedforward(paths: Sequence[str], on_input: Sequence[str]) -> list[str]:
    """The shortest names that tell the modules whose input is scaled from the others."""
    for parts in range(1, 1 + max((path.count(".") + 1 for path in on_input), default=0)):
        names = sorted({".".join(path.split(".")[-parts:]) for path in on_input})
        if all(feeds(names, path) == (path in on_input) for path in paths):
            return names
    if on_input:
        raise cannot("no names tell the modules whose input is scaled from the others")
    return []


def vector(group: Sequence[Level]) -> Tensor:
    """l over a module's outputs, from the parts of a packed matrix where it is one: 1 where no part acts."""
    site = group[0].site
    assert site.host is not None
    whole = torch.ones(site.host.to_matrix(site.parameter).shape[0])
    for level in group:
        assert isinstance(level.method, IA3)
        if level.method.on_input or (level.site.rows is None and len(group) > 1):
            raise cannot(f"PEFT has one IA3 at '{site.path}'")
        if level.site.rows is None:
            return shaped(level.method.l, site, False)
        if (level.site.rows.take(whole, 0) != 1).any():
            raise cannot(f"PEFT has one IA3 per row of '{site.path}'")
        whole = level.site.rows.put(whole, level.method.l.detach().cpu().to(whole.dtype), 0)
    return shaped(whole, site, False)


def shaped(v: Tensor, site: Site, on_input: bool) -> Tensor:
    """The vector l as PEFT's layer has it."""
    if isinstance(site.host, ConvHost):
        return v.reshape(1, -1, *(1 for _ in site.parameter.shape[2:]))
    return v.reshape(1, -1) if on_input else v.reshape(-1, 1)
