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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core.calls import first, first_output, replace_first, replace_first_output, some_rows, with_rows
from inlay.core.errors import RouteError
from inlay.core.hosts import QuantisedHost
from inlay.core.method import HiddenMethod, Method, ParameterMethod, WeightMethod
from inlay.core.needs import Needs
from inlay.core.paths import prefers_effective
from inlay.core.properties import adapt_tensors, release_tensors
from inlay.core.quantised import dense
from inlay.core.sharded import is_sharded
from inlay.core.sites import Site

if TYPE_CHECKING:
    from inlay.core.container import Ear, Inlay


@dataclass(eq=False)
class Level:
    """One built method at one site."""

    method: Method
    site: Site

    @property
    def head(self) -> bool:
        """Whether this is the task head trained beside the methods."""
        return self.method.kind == "head"


@dataclass(eq=False)
class Frame:
    """One running forward of a module."""

    formed: dict[str, Tensor] = field(default_factory=dict)
    """W′ and b′ for the forward to read, where forming them is the cheaper path."""
    inputs: list[Tensor] = field(default_factory=list)
    """Input of each level, where some act on inputs; else empty."""
    routed: dict[str, list[Tensor]] = field(default_factory=dict)
    """The same by adapter, for the rows that are routed to it."""
    read: dict[tuple[str, bool, int], Tensor] = field(default_factory=dict)
    """Closed forms read so far (with or without gradients): stacks of experts are read once per expert."""
    below: list[Level] = field(default_factory=list)
    """The levels under the one that acts on the output now, so that it can ask for the bias they give."""


class Mount:
    """Everything attached to one module."""

    def __init__(self, module: nn.Module, inlay: Inlay, path: str, owner: nn.Module | None = None) -> None:
        self.module, self.inlay, self.path = module, inlay, path
        self.owner = owner or module
        """The module whose forward applies the tensors: the module itself, or the parent that reads them."""
        self.levels: dict[str, list[Level]] = {}
        self.handles: list[Any] = []
        self.frames: list[Frame] = []  # one per forward of the owner that is running
        self.served = False  # whether a routed forward has come through here
        self.needs = Needs()
        self.answers: dict[tuple[Any, ...], bool] = {}  # of `inlay.core.paths`
        self.attached: frozenset[str] | None = None  # tensors that are read through here; None: no hooks either
        self.entries: set[str] = set()  # modules where the spans that end here begin
        self.ears: list[Ear] = []  # of methods elsewhere that hear this module's output
        self.heard: set[str] = set()  # modules whose outputs methods here hear

    # ------------------------------------------------------------------ attaching
    def add(self, adapter: str, level: Level) -> None:
        """Put a level on top of an adapter's; `refresh` attaches what it needs."""
        self.levels.setdefault(adapter, []).append(level)
        self.needs.count(level, 1)

    def drop(self, adapter: str) -> None:
        """Forget an adapter's levels; `refresh` removes what no other needs."""
        for level in self.levels.pop(adapter, ()):
            self.needs.count(level, -1)
        self.answers.clear()

    def refresh(self) -> bool:
        """Attach exactly what the levels need, and say whether that took new hooks; call after they change.

        What is attached already stays: the cost does not grow with the adapters that are there.
        """
        if not self.levels and not self.ears:
            self.remove()
            return False
        self.entries, self.heard = {*self.needs.entries}, {*self.needs.heard}
        names = {name for name in self.needs.tensors if self.module._parameters.get(name) is not None}
        names |= {*self.needs.states}
        new, before = self.attached is None, self.attached or frozenset()
        self.attached = frozenset(names)
        if names != before:
            adapt_tensors(self.module, self, self.attached) if names else release_tensors(self.module)
        if new:
            self.handles = [
                self.owner.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True),
                self.owner.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
            ]
        return new

    def remove(self) -> None:
        """Leave the module as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.answers.clear()
        if self.attached:
            release_tensors(self.module)
        self.attached = None

    # ------------------------------------------------------------------ which levels act
    def active(self) -> list[Level]:
        """The levels that act now, lowest first; none while rows are routed (groups of rows are run apart)."""
        if "state" not in self.inlay.__dict__ or self.inlay.routes is not None:
            return []  # without a state a copy of the model is on its way
        return [level for name in self.inlay.active for level in self.levels.get(name, ())]

    def groups(self, batch: int) -> list[tuple[str, Tensor]]:
        """Adapters that are here and asked for, with the indices of their rows."""
        return [(name, rows) for name, rows in self.inlay.route_groups(batch, self.path) if self.levels.get(name)]

    # ------------------------------------------------------------------ the forward
    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        frame = Frame()
        self.frames.append(frame)
        if self.inlay.routes is not None:
            return self.enter_rows(frame, args, kwargs)
        levels = self.active()
        if not levels:
            return None
        frame.formed = self.form(levels, args, kwargs)
        if frame.formed or not any(level.method.acts_before for level in levels):
            return None
        frame.inputs, x = descend(levels, first(args, kwargs))
        return replace_first(args, kwargs, x)

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self.frames:  # an earlier hook raised before `enter` ran
            return None
        frame = self.frames[-1]
        try:
            if output is None:  # the forward raised
                return None
            routed = self.inlay.routes is not None
            changed = (self.leave_rows if routed else self.act)(frame, module, args, kwargs, output)
            for ear in self.ears:
                ear.give(first_output(output if changed is None else changed))
            return changed
        finally:
            self.frames.pop()
            for path in self.heard:
                self.inlay.ears[path, self.path].value = None
            for entry in self.entries:
                self.inlay.spans[entry, self.path].value = None  # let go of the activation

    def act(self, frame: Frame, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The levels that act on outputs, after the module's own forward."""
        levels = self.active()
        if frame.formed or not any(acts_on_output(level) for level in levels):
            return None
        y = first_output(output)
        for k, level in enumerate(levels):
            if acts_on_output(level):
                own = frame.inputs and level.site.entry is None
                frame.below = levels[:k]
                y = by_rows(level, apply, frame.inputs[k] if own else self.input_of(level, args, kwargs), y)
        frame.below = []
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
        if not hooked or self.inlay.state.factored:
            return {}
        x = first(args, kwargs)
        if x.is_nested or not self.prefers_effective(hooked, x):
            return {}
        names = {lv.site.param for lv in levels} | {lv.site.bias_name for lv in levels if lv.method.acts_on_bias}
        return {name: t for name in names if (t := self.fold(name, levels)) is not None}

    def prefers_effective(self, levels: list[Level], x: Tensor) -> bool:
        """`inlay.core.paths` on these levels, asked once for each shape of input: the answer hangs on shapes alone."""
        pairs = [(level.method, level.site) for level in levels]
        if torch.compiler.is_compiling():  # asked when traced, which is once
            return prefers_effective(pairs, x)
        question = (x.shape, x.dtype, torch.is_grad_enabled(), *levels)
        if question not in self.answers:
            if len(self.answers) == ANSWERS:
                self.answers.clear()
            self.answers[question] = prefers_effective(pairs, x)
        return self.answers[question]

    def fold(self, name: str, levels: list[Level], base: Tensor | None = None) -> Tensor | None:
        """The base's tensor `name` (or `base` in its stead) with these levels in closed form, None if there is none.

        Trained copies of base tensors come first wherever they were listed: they replace what the others act on.
        """
        t: Tensor | None = base if base is not None else self.module._parameters.get(name)
        if t is None:
            return None
        if base is None and any(lv.site.param == name and isinstance(lv.site.host, QuantisedHost) for lv in levels):
            t = dense(self.module)
        for level in levels:
            if isinstance(level.method, ParameterMethod) and level.site.param == name:
                t = eased(level.method, t, level.method.parameter(t))
        weights = [level for level in levels if isinstance(level.method, WeightMethod)]
        if t.dim() == 3 and any(level.site.expert is not None for level in weights if level.site.param == name):
            return fold_experts(t, [level for level in weights if level.site.param == name])
        for level in weights:
            site, method = level.site, level.method
            assert isinstance(method, WeightMethod)
            if site.param == name:
                W = site.matrix_of(t)
                t = site.stored_from(eased(method, W, method.weight(W)), t)
            elif site.bias_name == name and method.acts_on_bias:
                b = site.bias_part(t)
                part = method.bias_of(b)
                assert part is not None
                t = site.bias_from(eased(method, b, part), t)
        return t

    def read(self, name: str) -> Tensor:
        """What the module's attribute `name` gives, see the head of this file."""
        levels = self.active()
        if name in self.module._buffers:
            return self.state(name, levels)
        if not self.frames:
            base = self.module._parameters.get(name)
            if base is not None and is_sharded(base):  # FSDP2 looks for its shard, which no forward can read
                return base
            return self.folded(name, levels)
        frame = self.frames[-1]
        if name in frame.formed:
            return frame.formed[name]
        key = (name, torch.is_grad_enabled(), len(frame.below))
        if key not in frame.read:  # levels that act on outputs do so in `leave`
            acted = [level for level in frame.below if acts_on_output(level)]
            frame.read[key] = self.folded(name, [level for level in levels if not acts_on_output(level)] + acted)
        return frame.read[key]

    def folded(self, name: str, levels: list[Level]) -> Tensor:
        t = self.fold(name, levels)
        assert t is not None
        return t

    def state(self, name: str, levels: list[Level]) -> Any:
        """The buffer `name`: the copy that one of these levels keeps, else the base's own."""
        copies = (kept(level).get(name) for level in levels)
        return next((t for t in copies if t is not None), self.module._buffers[name])

    def updates_states(self) -> bool:
        """Whether an adapter that keeps states of its own acts now, and is being trained."""
        return any(level.method.training for level in self.active() if kept(level))

    # ------------------------------------------------------------------ rows of one batch to different adapters
    def enter_rows(self, frame: Frame, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The inputs of rows whose adapter acts on inputs."""
        if not any(name in self.levels for name in self.inlay.routes or ()):
            return None
        x = self.spread(self.checked(first(args, kwargs)))
        for name, rows in self.groups(x.shape[0]):
            levels = self.levels[name]
            if any(level.method.acts_before for level in levels) and not self.reads_tensors(name):
                with self.inlay.narrowed(rows):
                    frame.routed[name], changed = descend(levels, x[rows])
                x = x.index_copy(0, rows, changed)
        return replace_first(args, kwargs, x) if frame.routed else None

    def leave_rows(self, frame: Frame, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The base's output with the rows of every routed adapter replaced by what that adapter gives."""
        self.served = True
        whole = first_output(output)
        output = replace_first_output(output, self.spread(whole))
        for name, rows in self.groups(first_output(output).shape[0]):
            if self.reads_tensors(name):
                part = self.rerun(module, args, kwargs, name, rows, whole.shape[0])
                output = with_rows(output, rows, part, first_output(output).shape[0])
                continue
            y = first_output(output)[rows]
            below = frame.routed.get(name, [])
            inputs = [
                below[k]
                if below and level.site.entry is None
                else self.spread(self.input_of(level, args, kwargs))[rows]
                for k, level in enumerate(self.levels[name])
            ]
            with self.inlay.narrowed(rows):
                for k, (level, x) in enumerate(zip(self.levels[name], inputs, strict=True)):
                    frame.below = self.levels[name][:k]
                    y = apply(level, x, y)
            frame.below = []
            whole = first_output(output)
            output = replace_first_output(output, with_rows(whole, rows, y, whole.shape[0]))
        return output

    def spread(self, t: Tensor) -> Tensor:
        """One row that serves the whole batch (position embeddings) as one row each."""
        n = len(self.inlay.routes or ())
        return t.expand(n, *t.shape[1:]) if t.shape[0] == 1 and n > 1 else t

    def reads_tensors(self, name: str) -> bool:
        """Whether an adapter acts here through tensors that the module reads, so that it must run for its rows."""
        return not all(acts_on_output(level) for level in self.levels[name])

    def checked(self, x: Tensor) -> Tensor:
        """x, or RouteError where the batch is not its first axis."""
        if isinstance(self.owner, nn.MultiheadAttention) and not self.owner.batch_first:
            raise RouteError(f"'{self.path}' has its batch on the second axis: use batch_first=True to route rows")
        if x.is_nested:
            raise RouteError(
                f"'{self.path}' is given a nested tensor, whose rows cannot be routed: "
                "build nn.TransformerEncoder with enable_nested_tensor=False"
            )
        return x

    def rerun(self, module: nn.Module, args: tuple, kwargs: dict, name: str, rows: Tensor, batch: int) -> Any:
        """The module on some rows (those of arguments with `batch` rows) as if `name` were the only adapter."""
        if any(kwargs.get(cache) is not None for cache in CACHES):
            raise RouteError(f"'{self.path}' would write its cache twice: rows cannot be routed there with a cache")
        if batch > 1 or len(self.inlay.routes or ()) == 1:
            args, kwargs = some_rows(args, rows, batch), some_rows(kwargs, rows, batch)
        depth = len(self.frames)
        try:
            with self.inlay.only(name), self.inlay.narrowed(rows):
                args, kwargs = self.enter(module, args, kwargs) or (args, kwargs)
                output = type(module).forward(module, *args, **kwargs)
                changed = self.leave(module, args, kwargs, output)
        finally:
            del self.frames[depth:]
        return output if changed is None else changed


ANSWERS = 64
"""Shapes of input for which a mount remembers its path."""
CACHES = ("past_key_values", "past_key_value", "cache_params", "layer_past")
"""Names under which transformers hands a cache to a module."""


def descend(levels: list[Level], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The input of each level, and that of the module below them all."""
    inputs = [x] * len(levels)
    for k in reversed(range(len(levels))):
        inputs[k] = x
        if levels[k].method.acts_before and acts_on_output(levels[k]):
            x = by_rows(levels[k], before, x)
    return inputs, x


def fold_experts(t: Tensor, levels: list[Level]) -> Tensor:
    """A stack (experts, …) with each level applied to its expert's matrix."""
    parts = list(t.unbind(0))
    for level in levels:
        site, method = level.site, level.method
        assert isinstance(method, WeightMethod)
        assert site.expert is not None
        W = site.matrix_of(parts[site.expert])
        parts[site.expert] = site.stored_from(eased(method, W, method.weight(W)), parts[site.expert])
    return torch.stack(parts)


def acts_on_output(level: Level) -> bool:
    """Whether a level acts through its module's output rather than through the tensor the module reads."""
    if isinstance(level.method, HiddenMethod):
        return True
    return applies_matrix(level) and not reads_formed(level)


def applies_matrix(level: Level) -> bool:
    """Whether the module's own forward applies the matrix that a level adapts."""
    host = level.site.host
    return isinstance(level.method, WeightMethod) and host is not None and host.hooked


def reads_formed(level: Level) -> bool:
    """Whether such a module reads W′ in the place of W; quantised layers read their own storage."""
    formed = isinstance(level.method, WeightMethod) and level.method.formed()
    return formed and applies_matrix(level) and not isinstance(level.site.host, QuantisedHost)


def kept(level: Level) -> dict[str, Tensor]:
    """The buffers of the module of which a level has copies."""
    return level.method.states() if isinstance(level.method, ParameterMethod) else {}


def has_closed_form(method: Method) -> bool:
    """Whether base tensors can stand for the method at this moment."""
    return isinstance(method, ParameterMethod) or (isinstance(method, WeightMethod) and method.exact_now())


def apply(level: Level, x: Tensor, y: Tensor) -> Tensor:
    """One level's `after`, on its rows of a packed output."""
    method, rows = level.method, level.site.rows
    if rows is None:
        return eased(method, y, method.after(x, y))
    part = rows.take(y, -1)
    return rows.put(y, eased(method, part, method.after(x, part)), -1)


def before(level: Level, x: Tensor) -> Tensor:
    """One level's `before`."""
    return eased(level.method, x, level.method.before(x))


def eased(method: Method, plain: Tensor, adapted: Tensor) -> Tensor:
    """What becomes of `plain` where a method that would make it `adapted` acts at its present strength."""
    return adapted if method.strength == 1.0 else plain.lerp(adapted, method.strength)


def by_rows(level: Level, act: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`act(level, …)` on whole batches; row by row on nested tensors, whose rows differ in length."""
    if not tensors[-1].is_nested:
        return act(level, *tensors)
    inlay = level.site.inlay
    assert inlay is not None
    done = []
    for i, row in enumerate(zip(*(t.unbind() for t in tensors), strict=True)):
        with inlay.narrowed(torch.tensor([i], device=row[0].device)):
            done.append(act(level, *(t[None] for t in row))[0])
    return torch.nested.as_nested_tensor(done, layout=tensors[-1].layout)
