"""The laws as plain functions of a trial, a method attached to a bench: AssertionError where a law is broken.

They are functions so that `test_law_can_fail.py` can hand them broken methods. Each leaves the trial as it found it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.core.active import attached
from inlay.core.adapter import Adapter
from inlay.core.errors import AdapterError, ComposeError, MergeError, RouteError
from inlay.core.method import ParameterMethod, TokenMethod, WeightMethod
from laws.benches import Inputs, run
from laws.cases import Case, stir
from laws.oracles import HIDDEN, ORACLES, Rule, given

RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Largest accepted difference between two ways to compute one output, relative to the largest number in it."""


# ---------------------------------------------------------------------- tools
def gap(a: Tensor, b: Tensor) -> float:
    """max |a − b| / max |a|."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    found = gap(a, b)
    assert found <= tolerance, f"{what}: relative difference {found:.2e}, allowed {tolerance:.0e}"


def same(a: Tensor, b: Tensor, what: str) -> None:
    assert torch.equal(a, b), f"{what}: not the same bits, relative difference {gap(a, b):.2e}"


@torch.no_grad()
def output(model: nn.Module, inputs: Inputs) -> Tensor:
    return run(model, inputs).clone()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the base by name, copied."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {n: numbers(t) for n, t in named if not n.startswith("inlay.")}


def numbers(t: Tensor) -> Tensor:
    """A copy that can be compared, of quantised tensors too."""
    own = type(t).dequantize is not Tensor.dequantize
    return (t.detach().dequantize() if own else t.detach()).clone()


def same_tensors(before: dict[str, Tensor], after: dict[str, Tensor], what: str) -> None:
    assert before.keys() == after.keys(), f"{what}: names {before.keys() ^ after.keys()}"
    moved = [n for n, t in before.items() if t.dtype != after[n].dtype or not torch.equal(t, after[n])]
    assert not moved, f"{what}: {moved} changed"


def anatomy_of(model: nn.Module) -> dict[str, Any]:
    """All that must be as it was after a detach: tree, classes, hooks, attributes, keys, tensors' identities, flags."""
    hooks = [k for k in nn.Module().__dict__ if k.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]
    return {
        "modules": [(n, id(m), type(m)) for n, m in model.named_modules()],
        "hooks": {n: [list(m.__dict__[h].values()) for h in hooks] for n, m in model.named_modules()},
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "keys": list(model.state_dict()),
        "tensors": [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)],
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
    }


def same_anatomy(before: dict[str, Any], after: dict[str, Any], what: str) -> None:
    for part in before:
        assert before[part] == after[part], f"{what}: {part} differ"


# ---------------------------------------------------------------------- a trial
@dataclass
class Trial:
    """A method attached to a bench."""

    case: Case
    model: nn.Module
    inputs: Inputs
    base: Tensor
    """Output of the plain base, its tensors frozen (torch picks kernels by that flag)."""
    held: dict[str, Any]
    """What the model was before anything was attached."""
    adapter: Adapter
    start: Tensor
    """Output right after attaching."""
    out: Tensor
    """Output after every trained tensor was moved."""

    @property
    def tolerance(self) -> float:
        return RELATIVE[self.case.dtype]

    def now(self) -> Tensor:
        return output(self.model, self.inputs)


def trial(case: Case) -> Trial:
    """Attach and stir; SiteError or ComposeError where the method refuses the bench."""
    model, inputs = case.model(), case.feed()
    held = anatomy_of(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)
    base = output(model, inputs)
    for n, p in model.named_parameters():
        p.requires_grad_(flags[n])
    adapter = case.attach(model)
    start = output(model, inputs)
    stir(adapter)
    return Trial(case, model, inputs, base, held, adapter, start, output(model, inputs))


# ---------------------------------------------------------------------- laws of one adapter
def check_identity(t: Trial) -> None:
    """1. The adapted model is the base at start, or the method says that it is not."""
    if t.case.method.starts_at_base:
        close(t.base, t.start, t.tolerance, "the start")
    else:
        hidden = t.case.dtype == torch.bfloat16  # a small start may vanish in rounding
        assert hidden or gap(t.base, t.start) > 1e-6, "declared not to start at the base, but does"


def check_count(t: Trial) -> None:
    """3. As many trained numbers as the closed form says."""
    for level in t.adapter.levels:
        built, said = sum(p.numel() for p in level.method.parameters()), level.method.count(level.site)
        assert built == said, f"{level.site.key}: {built} numbers, declared {said}"
    inside = sum(p.numel() for p in t.model.inlay.parameters())
    assert inside == t.adapter.adapter_parameters + t.adapter.head_parameters
    assert inside == sum(p.numel() for p in t.adapter.parameters())


def check_oracle(t: Trial) -> None:
    """5. The output is that of a plain model rebuilt densely from the paper's equation."""
    plain = t.case.model()
    with Rebuilt(t, plain):
        close(output(plain, t.inputs), t.out, t.tolerance, "against the equation")


class Rebuilt:
    """What the adapter means, written into a plain copy of the base: other tensors, or hooks for hidden methods."""

    def __init__(self, t: Trial, plain: nn.Module) -> None:
        self.handles: list[Any] = []
        write_copies(t, plain)
        levels = [lv for lv in t.adapter.levels if isinstance(lv.method, WeightMethod)]
        if levels:
            write_matrices(t, plain, levels)
        for level in t.adapter.levels:
            name = level.method.name()
            if name in HIDDEN:
                rule = on_part(HIDDEN[name](given(level.method, {})), part_of(t, level))
                at = plain.get_submodule(level.site.path)
                hook = lambda m, args, kwargs, y, rule=rule: changed(y, rule, (*args, *kwargs.values()))
                self.handles.append(at.register_forward_hook(hook, with_kwargs=True))

    def __enter__(self) -> None:
        return

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def changed(y: Any, rule: Rule, args: tuple) -> Any:
    if isinstance(y, Tensor) and y.is_nested:
        return torch.nested.as_nested_tensor([rule(a, b) for a, b in zip(args[0].unbind(), y.unbind(), strict=True)])
    return (rule(args[0], y[0]), *y[1:]) if isinstance(y, tuple) else rule(args[0], y)


def part_of(t: Trial, level: Any) -> tuple[int, ...] | None:
    """Which features of a packed output a hidden method's place stands for; None for all."""
    parts = dict(zip(t.case.bench.where, t.case.bench.slots, strict=False))
    role = next((role for role in parts if level.site.name.endswith(role)), None)
    return None if role is None or parts[role].path != level.site.path else parts[role].rows


def on_part(rule: Rule, part: tuple[int, ...] | None) -> Rule:
    """The rule on these features alone."""

    def on(x: Tensor, y: Tensor) -> Tensor:
        y = y.clone()
        y[..., list(part or ())] = rule(x, y[..., list(part or ())])
        return y

    return rule if part is None else on


def write_copies(t: Trial, plain: nn.Module) -> None:
    """Trained copies of base tensors, into the base's tensors."""
    for level in t.adapter.levels:
        if isinstance(level.method, ParameterMethod):
            for path, name in [(level.site.path, level.site.param), *((path, n) for path, _, n in level.site.ties)]:
                plain.get_submodule(path)._parameters[name].data.copy_(level.method.value.detach())


def write_matrices(t: Trial, plain: nn.Module, levels: list[Any]) -> None:
    """W′ and b′ of every slot, from the oracle."""
    slots, shared = t.case.bench.slots, dict(attached(t.model).tensors.named_buffers())
    assert len(levels) == len(slots), "the bench's slots and the adapter's sites differ"
    new = []
    for level, slot in zip(levels, slots, strict=True):
        W, b = slot.matrix(plain), slot.vector(plain)
        assert slot.path == level.site.path
        assert tuple(W.shape) == level.site.shape, f"{level.site.key}: {level.site.shape} is not {tuple(W.shape)}"
        new.append((slot, *ORACLES[level.method.name()](W, b, given(level.method, shared))))
    for slot in slots:  # a table that is adapted must not drag along the head that shares it
        p = slot.module(plain)._parameters.get(slot.param)
        if p is not None and sum(q is p for m in plain.modules() for q in m._parameters.values()) > 1:
            slot.module(plain)._parameters[slot.param] = nn.Parameter(p.detach().clone())
    for slot, W, b in new:
        slot.put(plain, W, b)


def check_merge(t: Trial) -> None:
    """6. Merged = adapted, rounded once; un-merging puts the very same tensors back."""
    if not t.case.method.mergeable:
        refuses(t.adapter.merge, MergeError)
        same(t.out, t.now(), "after a refused merge")
        return
    before, held = tensors(t.model), anatomy_of(t.model)
    if t.case.bench.quantised and isinstance(t.case.method, WeightMethod):
        refuses(t.adapter.merge, MergeError)
    t.adapter.merge(dequantise=t.case.bench.quantised)
    assert attached(t.model).active == []
    assert gap(t.now(), t.base) > 1e-5, "merging changed nothing"
    close(t.out, t.now(), t.tolerance, "merged against adapted")
    for call in (lambda: inlay.use(t.model, "default"), lambda: inlay.delete(t.model, "default"),
                 lambda: t.case.attach(t.model, "other")):  # fmt: skip
        refuses(call, AdapterError)
    if isinstance(t.case.method, WeightMethod) and t.case.dtype != torch.float64:
        check_rounded_once(t)
    t.adapter.unmerge()
    same_tensors(before, tensors(t.model), "un-merging")
    same_anatomy(held, anatomy_of(t.model), "un-merging")
    same(t.out, t.now(), "un-merged")


def check_rounded_once(t: Trial) -> None:
    """The merged matrix is the wide result, rounded once to the base's type."""
    plain = t.case.model()
    held = [(slot, slot.matrix(plain)) for slot in t.case.bench.slots] if t.case.bench.quantised else []
    plain.double()
    for slot, W in held:  # the dense numbers that the base computes with, not finer ones
        slot.put(plain, W, None)
    Rebuilt(t, plain)
    for slot in t.case.bench.slots:
        exact, found = slot.matrix(plain), slot.matrix(t.model)
        step = torch.finfo(t.case.dtype).eps * exact.abs() / 2  # half a step is what rounding costs
        wide = 1e-6 * exact.abs().max()
        assert bool(((exact - found).abs() <= 1.01 * step + wide).all()), f"{slot.path}: rounded more than once"


def check_disabled(t: Trial) -> None:
    """8. The adapter changes the output; disabled, the base computes as ever; the base's keys are its own."""
    assert gap(t.base, t.out) > 1e-6, "the method does nothing"
    assert [k for k in t.model.state_dict() if not k.startswith("inlay.")] == t.held["keys"], "state-dict keys moved"
    with inlay.disabled(t.model):
        same(t.base, t.now(), "disabled, against the base")
    same(t.out, t.now(), "enabled again")


def check_saved(t: Trial, folder: Path) -> None:
    """7. What is loaded into a fresh base gives the same bits."""
    fresh = t.case.model()
    t.adapter.save(str(folder))
    inlay.load(fresh, str(folder))
    same(t.out, output(fresh, t.inputs), "loaded")


def check_copied(t: Trial) -> None:
    """A deep copy of an adapted model is a model of its own."""
    twin = copy.deepcopy(t.model)
    stir(twin.inlay, 3)
    same(t.out, t.now(), "after its copy was changed")
    assert gap(t.out, output(twin, t.inputs)) > 1e-6, "the copy does not follow its own tensors"
    inlay.detach(twin)
    same(
        output(t.case.model().requires_grad_(False), t.inputs),
        output(twin.requires_grad_(False), t.inputs),
        "detached copy",
    )


# ---------------------------------------------------------------------- laws of several adapters
def check_several(t: Trial) -> None:
    """9. Two adapters switch without residue, stack, are routed row by row, and go away again."""
    lone = t.case.model()
    stir(t.case.attach(lone, "b", seed=2), 2)
    alone = output(lone, t.inputs)
    second = t.case.attach(t.model, "b", seed=2)
    stir(second, 2)
    for names, expected in ((["default"], t.out), (["b"], alone), ([], t.base), (["default"], t.out)):
        inlay.use(t.model, *names)
        same(expected, t.now(), f"switched to {names}")
        asking = {n for n, p in t.model.named_parameters() if p.requires_grad}
        mine = {n for n, _ in t.model.named_parameters() if n.startswith(tuple(f"inlay.adapters.{x}." for x in names))}
        assert asking == mine, f"switched to {names}, {asking ^ mine} ask for gradients or do not"
    check_stacked(t)
    check_routing(t)
    inlay.delete(t.model, "b")
    inlay.use(t.model, "default")
    same(t.out, t.now(), "after the other adapter was deleted")
    refuses(lambda: inlay.use(t.model, "b"), AdapterError)


def check_stacked(t: Trial) -> None:
    """Two adapters on top of each other act together and merge together, or are refused."""
    try:
        inlay.use(t.model, "default", "b")
    except ComposeError:
        return
    both = t.now()
    if not isinstance(t.case.method, TokenMethod):
        assert gap(both, t.out) > 1e-6, "the second adapter does nothing on top of the first"
    if t.case.method.mergeable:
        inlay.merge(t.model, "default", "b", dequantise=t.case.bench.quantised)
        close(both, t.now(), 2 * t.tolerance, "two merged against two stacked")
        inlay.unmerge(t.model)
        same(both, t.now(), "two un-merged")


def check_routing(t: Trial) -> None:
    """A batch with an adapter per row equals its rows one by one, rows of the plain base included."""
    names = ["default", None, "b", "default"]
    inlay.use(t.model)
    if not t.case.bench.routable:
        with inlay.route(t.model, names):
            refuses(t.now, RouteError)
        return
    for names in (["default", None, "b", "default"], ["b", "default"] * 2, ["default"] * 4):
        with inlay.route(t.model, names):
            routed = t.now()
        same(t.base, t.now(), "after routing")
        for i, name in enumerate(names[:3]):
            inlay.use(t.model, *([] if name is None else [name]))
            one = output(t.model, t.case.bench.pick(t.inputs, [i]))
            close(one, routed[i : i + 1], t.tolerance, f"row {i} ({name})")
        inlay.use(t.model)
    with inlay.route(t.model, [None] * 4):
        close(t.base, t.now(), t.tolerance, "rows of the base")
    for wrong, error in ((["b", None, "b"], RouteError), (["c"] * 4, AdapterError), ([], RouteError)):
        refuses(lambda wrong=wrong: routed_output(t, wrong), error)


def routed_output(t: Trial, names: list[str | None]) -> Tensor:
    with inlay.route(t.model, names):
        return t.now()


def check_detached(t: Trial) -> None:
    """8. Detached, nothing is left. Comes last."""
    inlay.detach(t.model)
    same_anatomy(t.held, anatomy_of(t.model), "detaching")


def refuses(call: Callable[[], Any], error: type[Exception]) -> None:
    try:
        call()
    except error as raised:
        assert len(str(raised)) > 20, f"no reason given: {raised}"  # noqa: PT017
        return
    raise AssertionError(f"{error.__name__} was not raised")


# ---------------------------------------------------------------------- laws of training
def target(base: Tensor) -> Tensor:
    """Something to learn: the base's outputs, moved."""
    generator = torch.Generator().manual_seed(5)
    return base.float() + 0.5 + 0.5 * torch.randn(base.shape, generator=generator)


def check_training(case: Case) -> None:
    """2 and 4. Every trained tensor gets a gradient, the loss falls, and no tensor of the base moves."""
    losses = train(case, 5e-3)
    if min(losses[1:]) >= losses[0]:  # a scaled embedding takes smaller steps, bfloat16 larger ones
        losses = train(case, 1e-3)
    assert min(losses[1:]) < losses[0], f"the loss went {losses}"


def train(case: Case, rate: float, steps: int = 6) -> list[float]:
    """The losses of a few steps, in which everything else that training must do was checked."""
    model, inputs = case.model(), case.feed()
    before, goal, losses = tensors(model), target(output(model, inputs)), []
    adapter = case.attach(model)
    asking = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(n.startswith("inlay.") for n in asking), f"tensors of the base ask for gradients: {asking}"
    named = dict(attached(model).adapters[adapter.name].named_parameters())
    touched = dict.fromkeys(named, False)
    optimizer = torch.optim.Adam(named.values(), lr=rate)
    model.train()
    for _ in range(steps):
        loss = (run(model, inputs).float() - goal).square().mean() + inlay.penalty(model)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        for n, p in named.items():
            assert p.grad is not None or not p.requires_grad, f"{n} has no gradient"
            touched[n] |= p.grad is not None and bool(p.grad.ne(0).any())
        optimizer.step()
        inlay.step(model, len(losses) / steps, optimizer)
    dead = [n for n, alive in touched.items() if not alive]
    assert not dead, f"never got a gradient: {dead}"
    same_tensors(before, tensors(model), "training")
    inlay.detach(model)
    same_tensors(before, tensors(model), "detaching")
    return losses


# ---------------------------------------------------------------------- all of them
def check_all(case: Case, folder: Path) -> list[str]:
    """Every law that a case breaks, in words."""
    t = trial(case)
    laws: list[Callable[[], None]] = [
        lambda: check_identity(t), lambda: check_count(t), lambda: check_disabled(t), lambda: check_merge(t),
        lambda: check_saved(t, folder),
    ]  # fmt: skip
    if case.dtype != torch.float64:
        laws.append(lambda: check_training(case))
    if has_oracle(case):
        laws.append(lambda: check_oracle(t))
    if case.dtype == torch.float32:
        laws += [lambda: check_copied(t), lambda: check_several(t)]
    laws.append(lambda: check_detached(t))
    broken = []
    for law in laws:
        try:
            law()
        except AssertionError as error:
            broken.append(f"{law.__code__.co_names[0]}: {error}")
    return broken


def has_oracle(case: Case) -> bool:
    """Whether the equation is written down here; that of methods on tokens is in tests/tokens."""
    if isinstance(case.method, WeightMethod | ParameterMethod):
        return True
    spanning = case.method.name() in HIDDEN and case.bench.name in ("bert", "classifier", "embedding")
    return case.method.name() in HIDDEN and not spanning
