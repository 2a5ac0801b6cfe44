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

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core.calls import first, first_output, replace_first, replace_first_output
from inlay.core.hosts import QuantisedHost
from inlay.core.levels import (
    Frame,
    Level,
    acts_on_output,
    climb,
    descend,
    eased,
    fold_experts,
    has_closed_form,
    kept,
)  # fmt: skip
from inlay.core.method import ParameterMethod, WeightMethod
from inlay.core.needs import Needs
from inlay.core.paths import lean_step, prefers_effective
from inlay.core.properties import adapt_tensors, release_tensors
from inlay.core.quantised import dense
from inlay.core.routed import Router
from inlay.core.sharded import is_sharded

if TYPE_CHECKING:
    from inlay.core.container import Ear, Inlay


class Mount:
    """Everything attached to one module."""

    def __init__(self, module: nn.Module, inlay: Inlay, path: str, owner: nn.Module | None = None) -> None:
        self.module, self.inlay, self.path = module, inlay, path
        self.owner = owner or module
        """The module whose forward applies the tensors: the module itself, or the parent that reads them."""
        self.levels: dict[str, list[Level]] = {}
        self.handles: list[Any] = []
        self.frames: list[Frame] = []  # one per forward of the owner that is running
        self.router = Router(self)
        self.needs = Needs()
        self.answers: dict[tuple[Any, ...], bool] = {}  # of `inlay.core.paths`
        self.attached: frozenset[str] | None = None  # tensors that are read through here; None: no hooks either
        self.ears: list[Ear] = []  # of methods elsewhere that hear this module's output

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

    # ------------------------------------------------------------------ the forward
    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        frame = Frame()
        self.frames.append(frame)
        if self.inlay.routes is not None:
            return self.router.enter(frame, args, kwargs)
        levels = self.active()
        if not levels:
            return None
        x = first(args, kwargs)
        frame.lean = None if self.inlay.state.factored else lean_step(module, levels, x)
        if frame.lean is not None:
            frame.formed = frame.lean.formed()
            return replace_first(args, kwargs, x.detach())
        frame.formed = self.form(levels, x)
        if frame.formed or not any(level.method.acts_before for level in levels):
            return None
        frame.inputs, x = descend(levels, x)
        return replace_first(args, kwargs, x)

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self.frames:  # an earlier hook raised before `enter` ran
            return None
        frame = self.frames[-1]
        try:
            if output is None:  # the forward raised
                return None
            routed = self.inlay.routes is not None
            changed = (self.router.leave if routed else self.act)(frame, module, args, kwargs, output)
            for ear in self.ears:
                ear.give(first_output(output if changed is None else changed))
            return changed
        finally:
            self.frames.pop()
            for path in self.needs.heard:
                self.inlay.ears[path, self.path].value = None
            for entry in self.needs.entries:
                self.inlay.spans[entry, self.path].value = None  # let go of the activation

    def act(self, frame: Frame, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The levels that act on outputs, after the module's own forward."""
        if frame.lean is not None:
            return frame.lean.through(output)
        levels = self.active()
        if frame.formed or not any(acts_on_output(level) for level in levels):
            return None
        inputs = frame.inputs or [first(args, kwargs)] * len(levels)
        inputs = [self.input_of(level, x) for level, x in zip(levels, inputs, strict=True)]
        return replace_first_output(output, climb(frame, levels, inputs, first_output(output)))

    def input_of(self, level: Level, x: Tensor) -> Tensor:
        """The input of a level: x, what enters this module there, or what enters the module where its span begins."""
        return x if level.site.entry is None else self.inlay.spans[level.site.entry, self.path].input()

    # ------------------------------------------------------------------ closed form
    def form(self, levels: list[Level], x: Tensor) -> dict[str, Tensor]:
        """W′ and b′ where all levels have a closed form that holds now and forming it is the cheaper path."""
        if not all(has_closed_form(level.method) for level in levels):
            return {}
        hooked = [level for level in levels if acts_on_output(level)]
        if not hooked or self.inlay.state.factored:
            return {}
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


ANSWERS = 64
"""Shapes of input for which a mount remembers its path."""
