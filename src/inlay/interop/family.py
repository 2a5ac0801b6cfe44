"""What reading and writing one PEFT method needs: the folder being read, the adapter being written, the contract."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.adapter import Adapter
from inlay.core.errors import CheckpointError, SiteError, near
from inlay.core.levels import Level
from inlay.core.method import Method
from inlay.core.sites import Site
from inlay.core.where import Finder
from inlay.interop.fields import Field
from inlay.interop.matching import Targets, modules, name_targets


@dataclass
class Part:
    """A method for one site and the tensors it is to hold, by the names of `Method.stored`."""

    method: Method
    site: Site
    tensors: dict[str, Tensor]


@dataclass
class Reading:
    """A PEFT folder on its way into a model."""

    model: nn.Module
    folder: Path
    config: dict[str, Any]
    left: dict[str, Tensor]
    """Tensors that nothing has claimed yet, by their names without PEFT's prefix."""
    dtype: torch.dtype = torch.float32
    shared: dict[str, Tensor] = field(default_factory=dict)
    """Shared frozen tensors that come with the folder, by their names in `model.inlay`."""
    adapted: list[str] = field(default_factory=list)
    """Modules that the method adapts, filled by its family."""
    finder: Finder = field(init=False)

    def __post_init__(self) -> None:
        self.finder = Finder(self.model)

    def take(self, key: str) -> Tensor:
        """The tensor of that name, claimed; lower precisions are widened to float32, as PEFT does on loading."""
        if key not in self.left:
            raise CheckpointError(f"{self.folder} lacks the tensor '{key}', which its configuration asks for")
        t = self.left.pop(key)
        return t.to(self.dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    def matrix(self, key: str) -> Tensor:
        """The same for a tensor with rows and columns; kernels are flattened to them."""
        t = self.take(key)
        if t.dim() < 2:
            raise CheckpointError(f"{self.folder}: '{key}' is {tuple(t.shape)}, a matrix is needed")
        return t.flatten(1)

    def targets(self) -> list[str]:
        """Modules that the configuration names; SiteError with near misses when there is none."""
        targets = Targets.of(self.config)
        found = targets.paths(self.model)
        if not found and targets.target:
            names = targets.target if isinstance(targets.target, list) else [targets.target]
            endings = {path.rpartition(".")[2] for path, _ in modules(self.model)}
            raise SiteError(
                f"{self.folder}: target_modules {sorted(names)} match nothing in {type(self.model).__name__}"
                + "".join(near(name, endings) for name in names[:3])
            )
        return found

    def sites(self, method: Method, paths: Sequence[str]) -> dict[str, Site]:
        """One site per module path."""
        if not paths:
            return {}
        found = self.finder.sites(method, ["re:" + "|".join(map(re.escape, paths))], self.dtype)
        sites = {site.path: site for site in found if site.path in set(paths)}
        for site in sites.values():
            site.peers = list(sites.values())
        return sites


@dataclass
class Writing:
    """An adapter on its way into a PEFT folder."""

    adapter: Adapter
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By their names without PEFT's prefix."""
    saved: list[str] = field(default_factory=list)
    """`modules_to_save`."""
    adapted: list[str] = field(default_factory=list)
    """Modules that PEFT will wrap, so that their own tensors are found under `base_layer`."""

    @property
    def model(self) -> nn.Module:
        return self.adapter.model

    def targets(self, paths: Sequence[str]) -> list[str] | str:
        """`target_modules` for exactly these modules."""
        named = name_targets(self.model, paths, self.saved)
        found = set(Targets(named, saved=tuple(self.saved)).paths(self.model))
        if found != set(paths):
            raise cannot(
                f"'{sorted(set(paths) ^ found)[0]}' is adapted inside a module that is trained as a whole "
                f"(modules_to_save {self.saved}), which PEFT leaves out"
            )
        return named


class Family(ABC):
    """One PEFT method: its configuration's fields and the way between its tensors and inlay's."""

    peft_type: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]
    note: ClassVar[str]
    """What of inlay corresponds to it, for the support table."""
    prefix: ClassVar[str] = "base_model.model."
    """What PEFT puts before the base's own names."""

    @abstractmethod
    def takes(self, method: Method) -> bool:
        """Whether a built method can be written as this PEFT method."""

    @abstractmethod
    def read(self, reading: Reading) -> list[Part]:
        """The methods a folder describes; claims its tensors."""

    @abstractmethod
    def write(self, writing: Writing, levels: Sequence[Level]) -> None:
        """Fill in configuration and tensors."""


def cannot(reason: str) -> CheckpointError:
    return CheckpointError(f"this adapter cannot be written as a PEFT folder: {reason}")


def one_value(values: Iterable[Any], what: str) -> Any:
    """The value they all share; refused when they differ, because PEFT has one for the whole adapter."""
    distinct = list(dict.fromkeys(values))
    if len(distinct) != 1:
        raise cannot(f"PEFT has one {what} for the whole adapter, this one has {distinct}")
    return distinct[0]
