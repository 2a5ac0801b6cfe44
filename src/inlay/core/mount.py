"""Mounts: what is attached to one module of the base, and the order in which it acts.

Level k at a module wraps the module formed by the levels below it:

    f_k(x) = after_k(x, f_{k−1}(before_k(x))),      f_0 = the base module with its trained tensor copies.

The base module keeps its class hierarchy, its tensors and its state-dict keys. Inputs and outputs are seen through
hooks. The tensors a module reads (`weight`, `bias`, …) are properties of a private subclass while something is
mounted: inside the module's own forward they give the base tensor (or W′ where forming it is the cheaper path), and
anywhere else they give W′, so code that bypasses the forward (`nn.MultiheadAttention.out_proj`, tied weights,
functional calls) is adapted too instead of silently not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core.errors import RouteError
from inlay.core.method import HiddenMethod, Method, ParameterMethod, WeightMethod
from inlay.core.paths import prefers_effective
from inlay.core.sites import Site

if TYPE_CHECKING:
    from inlay.core.adapter import Inlay


@dataclass(eq=False)
class Level:
    """One built method at one site."""

    method: Method
    site: Site

    @property
    def head(self) -> bool:
        """Whether this is the task head trained beside the methods."""
        return self.method.kind == "head"


class Mount:
    """Everything attached to one module."""

    def __init__(self, module: nn.Module, inlay: Inlay, path: str, owner: nn.Module | None = None) -> None:
        self.module, self.inlay, self.path = module, inlay, path
        self.owner = owner or module
        """The module whose forward applies the tensors: the module itself, or the parent that reads them."""
        self.levels: dict[str, list[Level]] = {}
        self.handles: list[Any] = []
        self.inside = 0  # how deep the running forward is nested in itself
        self.served = False  # whether a routed forward has come through here
        self.formed: dict[str, Tensor] = {}  # W′ and b′ for the forward that is running to read
        self.entries: set[str] = set()  # modules where the spans that end here begin
        self.inputs: list[list[Tensor]] = []  # inputs of each level, pushed by `enter` and popped by `leave`

    # ------------------------------------------------------------------ attaching
    def refresh(self) -> None:
        """Attach exactly what the levels need; call after they change."""
        self.remove()
        levels = [level for stack in self.levels.values() for level in stack]
        if not levels:
            return
        self.entries = {level.site.entry for level in levels if level.site.entry is not None}
        names = {level.site.param for level in levels if not isinstance(level.method, HiddenMethod)}
        names |= {level.site.bias_name for level in levels if level.method.acts_on_bias}
        names = {name for name in names if self.module._parameters.get(name) is not None}
        if names:
            install(self.module, self, frozenset(names))
        self.handles.append(self.owner.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True))
        self.handles.append(self.owner.register_forward_hook(self.leave, with_kwargs=True, always_call=True))

    def remove(self) -> None:
        """Leave the module as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        uninstall(self.module)

    # ------------------------------------------------------------------ which levels act
    def active(self) -> list[Level]:
        """The levels that act now, lowest first; none while rows are routed (groups of rows are run apart)."""
        if self.inlay.routes is not None:
            return []
        return [level for name in self.inlay.active for level in self.levels.get(name, ())]

    def groups(self, batch: int) -> list[tuple[str, Tensor]]:
        """Adapters that are here and asked for, with the indices of their rows."""
        return [(name, rows) for name, rows in self.inlay.route_groups(batch, self.path) if self.levels.get(name)]

    # ------------------------------------------------------------------ the forward
    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.inside += 1
        levels = self.active()
        if not levels:
            return None
        self.formed = self.form(levels, args, kwargs)
        if not any(level.method.acts_before for level in levels):
            return None
        x = first(args, kwargs)
        inputs = [x] * len(levels)
        for k in reversed(range(len(levels))):
            inputs[k] = x
            if levels[k].method.acts_before and not self.formed and acts_on_output(levels[k]):
                x = levels[k].method.before(x)
        self.inputs.append(inputs)
        return replace_first(args, kwargs, x)

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        try:
            return self.act(module, args, kwargs, output)
        finally:
            self.inside -= 1
            for entry in self.entries:
                self.inlay.spans[entry, self.path].value = None  # let go of the activation

    def act(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The levels that act on outputs, after the module's own forward."""
        formed, self.formed = bool(self.formed), {}
        if output is None:  # the forward raised
            self.inputs.clear()
            return None
        if self.inlay.routes is not None:
            return self.route(module, args, kwargs, output)
        levels = self.active()
        inputs = self.inputs.pop() if any(level.method.acts_before for level in levels) else None
        if formed or not any(acts_on_output(level) for level in levels):
            return None
        y = first_output(output)
        for k, level in enumerate(levels):
            if acts_on_output(level):
                x = self.input_of(level, args, kwargs) if inputs is None or level.site.entry else inputs[k]
                y = apply(level, x, y)
        return replace_first_output(output, y)

    def input_of(self, level: Level, args: tuple, kwargs: dict) -> Tensor:
        """The input of a level: that of this module, or of the module where its span begins."""
        if level.site.entry is None:
            return first(args, kwargs)
        return self.inlay.spans[level.site.entry, self.path].input()

    # ------------------------------------------------------------------ closed form
    def form(self, levels: list[Level], args: tuple, kwargs: dict) -> dict[str, Tensor]:
        """W′ and b′ where all levels have a closed form that holds now and forming it is the cheaper path."""
        if not all(has_closed_form(level.method) for level in levels):
            return {}
        hooked = [level for level in levels if acts_on_output(level)]
        if not hooked or not prefers_effective([(lv.method, lv.site) for lv in hooked], first(args, kwargs)):
            return {}
        names = {lv.site.param for lv in levels} | {lv.site.bias_name for lv in levels if lv.method.acts_on_bias}
        return {name: t for name in names if (t := self.fold(name, levels)) is not None}

    def fold(self, name: str, levels: list[Level], base: Tensor | None = None) -> Tensor | None:
        """The base's tensor `name` (or `base` in its stead) with these levels in closed form, None if there is none.

        Trained copies of base tensors come first wherever they were listed: they replace what the others act on.
        """
        t: Tensor | None = base if base is not None else self.module._parameters.get(name)
        if t is None:
            return None
        for level in levels:
            if isinstance(level.method, ParameterMethod) and level.site.param == name:
                t = level.method.parameter(t)
        weights = [level for level in levels if isinstance(level.method, WeightMethod)]
        if t.dim() == 3 and any(level.site.expert is not None for level in weights if level.site.param == name):
            return fold_experts(t, [level for level in weights if level.site.param == name])
        for level in weights:
            site, method = level.site, level.method
            assert isinstance(method, WeightMethod)
            if site.param == name:
                t = site.stored_from(method.weight(site.matrix_of(t)), t)
            elif site.bias_name == name and method.acts_on_bias:
                part = method.bias_of(t if site.rows is None else site.rows.take(t, 0))
                assert part is not None
                t = part if site.rows is None else site.rows.put(t, part, 0)
        return t

    def read(self, name: str) -> Tensor:
        """What the module's attribute `name` gives, see the head of this file."""
        if name in self.formed:
            return self.formed[name]
        levels = self.active()
        if self.inside:  # levels that act on outputs do so in `leave`
            levels = [level for level in levels if not acts_on_output(level)]
        t = self.fold(name, levels)
        assert t is not None
        return t

    # ------------------------------------------------------------------ rows of one batch to different adapters
    def route(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The base's output with the rows of every routed adapter replaced by what that adapter gives."""
        self.served = True
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise RouteError(f"'{self.path}' has its batch on the second axis: use batch_first=True to route rows")
        x, y = first(args, kwargs), first_output(output)
        shared = y.shape[0] == 1  # one row for the whole batch (position embeddings): it must become several
        if shared:
            y = y.expand(len(self.inlay.routes or ()), *y.shape[1:])
        for name, rows in self.groups(y.shape[0]):
            levels = self.levels[name]
            if all(acts_on_output(level) and not level.method.acts_before for level in levels) and not shared:
                part, inputs = y[rows], [self.input_of(level, args, kwargs)[rows] for level in levels]
                with self.inlay.narrowed(rows):
                    for level, x_rows in zip(levels, inputs, strict=True):
                        part = apply(level, x_rows, part)
            else:
                part = self.rerun(module, args, kwargs, name, rows, 0 if shared else x.shape[0])
            y = y.index_copy(0, rows, part.to(y.dtype).expand(len(rows), *y.shape[1:]))
        return replace_first_output(output, y)

    def rerun(self, module: nn.Module, args: tuple, kwargs: dict, name: str, rows: Tensor, batch: int) -> Tensor:
        """The module on some rows (those of arguments with `batch` rows) as if `name` were the only adapter."""

        def pick(t: Any) -> Any:
            return t[rows] if isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == batch else t

        args, kwargs = tuple(pick(a) for a in args), {k: pick(v) for k, v in kwargs.items()}
        with self.inlay.only(name), self.inlay.narrowed(rows):
            args, kwargs = self.enter(module, args, kwargs) or (args, kwargs)
            output = type(module).forward(module, *args, **kwargs)
            changed = self.leave(module, args, kwargs, output)
        return first_output(output if changed is None else changed)


def fold_experts(t: Tensor, levels: list[Level]) -> Tensor:
    """A stack (experts, …) with each level applied to its expert's matrix."""
    parts = list(t.unbind(0))
    for level in levels:
        site, method = level.site, level.method
        assert isinstance(method, WeightMethod)
        assert site.expert is not None
        parts[site.expert] = site.stored_from(method.weight(site.matrix_of(parts[site.expert])), parts[site.expert])
    return torch.stack(parts)


def acts_on_output(level: Level) -> bool:
    """Whether a level acts through its module's output rather than through the tensor the module reads."""
    if isinstance(level.method, HiddenMethod):
        return True
    return isinstance(level.method, WeightMethod) and level.site.host is not None and level.site.host.hooked


def has_closed_form(method: Method) -> bool:
    """Whether base tensors can stand for the method at this moment."""
    return isinstance(method, ParameterMethod) or (isinstance(method, WeightMethod) and method.exact_now())


def apply(level: Level, x: Tensor, y: Tensor) -> Tensor:
    """One level's `after`, on its rows of a packed output."""
    rows = level.site.rows
    if rows is None:
        return level.method.after(x, y)
    return rows.put(y, level.method.after(x, rows.take(y, -1)), -1)


# ---------------------------------------------------------------------- inputs and outputs of any module
def first(args: tuple, kwargs: dict) -> Tensor:
    """The first tensor argument of a call."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("inlay found no tensor among a module's arguments")


def replace_first(args: tuple, kwargs: dict, x: Tensor) -> tuple[tuple, dict]:
    """The same call with its first tensor argument replaced."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], x, *args[i + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, name: x}
    raise TypeError("inlay found no tensor among a module's arguments")


def first_output(output: Any) -> Tensor:
    """The main tensor of a module's output (tensor, tuple, or a mapping such as transformers' ModelOutput)."""
    if isinstance(output, Tensor):
        return output
    return output[0]


def replace_first_output(output: Any, y: Tensor) -> Any:
    """The same output with its main tensor replaced."""
    if isinstance(output, Tensor):
        return y
    if isinstance(output, dict):
        name = next(iter(output))
        return type(output)(**{**output, name: y})
    return type(output)((y, *output[1:]))


# ---------------------------------------------------------------------- tensors as properties while mounted
def install(module: nn.Module, mount: Mount, names: frozenset[str]) -> None:
    """Let the attributes `names` of this one module be read through its mount."""
    module.__dict__["_inlay_mount"] = mount
    module.__class__ = _mounted_class(type(module), names)


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    if module.__dict__.pop("_inlay_mount", None) is not None:
        module.__class__ = type(module).__bases__[0]


@cache
def _mounted_class(cls: Any, names: frozenset[str]) -> type[nn.Module]:
    """A subclass that differs in those properties only: same name, same forward, same `isinstance` answers."""
    body = {name: property(_reader(name)) for name in sorted(names)}
    return type(cls.__name__, (cls,), {**body, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    def read(module: nn.Module) -> Tensor:
        try:
            return module.__dict__["_inlay_mount"].read(name)
        except AttributeError as error:  # nn.Module.__getattr__ would hide it and give the plain base tensor
            raise RuntimeError(f"inlay could not adapt '{name}': {error}") from error

    return read
