"""What PEFT methods share that keep tensors of their own at each adapted module, and one set of options for all."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar, cast

from torch import Tensor, nn

from inlay.core.errors import CheckpointError
from inlay.core.hosts import Host, LinearHost
from inlay.core.levels import Level
from inlay.core.method import Method
from inlay.core.sites import Site
from inlay.interop.family import Family, Part, Reading, Writing, cannot, one_value

M = TypeVar("M", bound=Method)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ModuleFamily(Family, Generic[M]):
    """A PEFT method with tensors at every adapted module; what differs from module to module follows from them."""

    kinds: ClassVar[tuple[type[Method], ...]]
    """The methods of inlay that it is."""
    hosts: ClassVar[tuple[type[Host], ...]] = (LinearHost,)
    """Modules that it adapts, beside convolutions."""
    convolutions: ClassVar[tuple[type[nn.Module], ...]] = ()
    places: ClassVar[str] = "nn.Linear"
    """Both in words."""
    checks: ClassVar[tuple[Callable[[Convolution], str], ...]] = ()
    """Each says why PEFT computes something else at such a convolution; empty where it does not."""
    or_lora: ClassVar[bool] = False
    """Whether what PEFT cannot have as this method can be a LORA there, so that it is left to that."""

    def takes(self, method: Method) -> bool:
        if not isinstance(method, self.kinds):
            return False
        return not self.or_lora or (method.site.rows is None and not self.differs(method.site))

    @abstractmethod
    def spec(self, reading: Reading) -> M:
        """The options of the configuration."""

    @abstractmethod
    def part(self, reading: Reading, spec: M, path: str, site: Site) -> Part:
        """The method at one module; claims its tensors."""

    @abstractmethod
    def config(self, methods: Sequence[M], sites: Sequence[Site]) -> dict[str, Any]:
        """The configuration of methods at these sites; refused where they need more than one."""

    @abstractmethod
    def tensors(self, method: M, site: Site) -> dict[str, Tensor]:
        """Its tensors at one module, by what PEFT calls them after the module's path."""

    def together(self, methods: Sequence[M]) -> dict[str, Tensor]:
        """Tensors of no module, that all share; none unless a family replaces it."""
        return {}

    def differs(self, site: Site) -> str:
        """Why PEFT cannot adapt this module, or would compute something else there; empty where neither is so."""
        module = site.module
        if isinstance(module, self.convolutions):
            assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            return next((reason for check in self.checks if (reason := check(module))), "")
        if type(site.host) not in self.hosts:
            return f"PEFT has {self.peft_type} on {self.places} alone, this is {type(module).__name__}"
        return ""

    def read(self, reading: Reading) -> list[Part]:
        spec, paths, parts = self.spec(reading), reading.targets(), list[Part]()
        for path, site in reading.sites(spec, paths).items():
            if reason := self.differs(site):
                raise CheckpointError(f"{reading.folder}: '{path}' cannot be read: {reason}")
            parts.append(self.part(reading, spec, path, site))
        if not parts:
            raise CheckpointError(f"{reading.folder}: the configuration names no module")
        reading.adapted += paths
        return parts

    def write(self, writing: Writing, levels: Sequence[Level]) -> None:
        sites = whole_modules(levels, self.peft_type)
        for site in sites:
            if reason := self.differs(site):
                raise cannot(f"'{site.path}': {reason}")
        methods = [cast(M, level.method) for level in levels]
        paths = [site.path for site in sites]
        writing.config |= self.config(methods, sites) | {"target_modules": writing.targets(paths)}
        for path, method, site in zip(paths, methods, sites, strict=True):
            writing.tensors |= {f"{path}.{name}": t for name, t in self.tensors(method, site).items()}
        writing.tensors |= self.together(methods)
        writing.adapted += paths


def whole_modules(levels: Sequence[Level], peft_type: str) -> list[Site]:
    """The sites of levels that each have a module to themselves."""
    sites = [level.site for level in levels]
    for site in sites:
        if site.rows is not None:
            raise cannot(f"'{site.key}' is part of a packed matrix; PEFT's {peft_type} adapts a module as a whole")
    paths = [site.path for site in sites]
    if len(set(paths)) != len(paths):
        raise cannot(f"PEFT has one {peft_type} per module")
    return sites


def no_dropout(methods: Sequence[Method], peft_type: str) -> None:
    """Refuse dropout on the input, for PEFT methods that have none."""
    if any(method.fields()["dropout"] for method in methods):
        raise cannot(f"PEFT's {peft_type} has no dropout on its input: set `dropout` of the methods to 0 first")


def alike(methods: Sequence[Method], *names: str) -> list[Any]:
    """The values of options that PEFT has once for the whole adapter."""
    return [one_value((method.fields()[name] for method in methods), name) for name in names]


def grouped(module: Convolution) -> str:
    """Why a method that reads all channels together cannot be at a convolution with groups; empty where it has none."""
    if module.groups == 1:
        return ""
    return f"PEFT has this method on convolutions without groups alone, this one has {module.groups}"


def pads_otherwise(module: nn.Module) -> str:
    """Why an update that pads with zeros is no update of a convolution's kernel; empty where it is one."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ""
    padded = module.padding == "same" or any(p != 0 for p in module.padding)
    if module.padding_mode == "zeros" or not padded:
        return ""
    return f"PEFT pads with zeros, the base with padding_mode='{module.padding_mode}'"
