"""Rows of one batch to different adapters: `inlay.route`, at one module.

Adapters whose methods there are alike (class, options, shapes) act together: their tensors are stacked, and one batched
computation serves the rows of all of them. What reads its tensors outside of hooks, or is alone, runs on its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from inlay.core.calls import first, first_output, replace_first, replace_first_output, some_rows, with_rows
from inlay.core.errors import RouteError
from inlay.core.levels import Frame, Level, acts_on_output, climb, descend
from inlay.core.method import Method, WeightMethod

if TYPE_CHECKING:
    from inlay.core.container import Inlay
    from inlay.core.mount import Mount

Act = Callable[..., Any]
OWN = frozenset(vars(nn.Module()))  # what every module has
CACHES = ("past_key_values", "past_key_value", "cache_params", "layer_past")
"""Names under which transformers hands a cache to a module."""


class Column(nn.Module):
    """The methods of one adapter at one module, as a function of their tensors."""

    def __init__(self, levels: list[Level]) -> None:
        super().__init__()
        self.methods = nn.ModuleList(level.method for level in levels)

    def forward(self, act: Act, *given: Any) -> Any:
        return act(*given)


@dataclass(eq=False)
class Group:
    """Adapters that act together at one module: N times one of them on R rows of the batch."""

    names: list[str]
    levels: list[Level]
    """Those of the first adapter, whose tensors stand for all in turn."""
    tensors: list[dict[str, Tensor]]
    """Of each adapter."""
    owners: Tensor | None
    """Which adapter it is, (N,), where rows are computed one by one; None: the first, the second, …"""
    rows: Tensor
    """(N, R); adapters with fewer rows have their first one several times."""
    kept: Tensor | None
    """Which of the N·R are no such repetitions; None for all."""
    whole: bool
    """Whether the rows are those of the batch in their order."""
    stack: dict[str, Tensor] = field(default_factory=dict)
    stamps: list[tuple[int, int]] = field(default_factory=list)
    """Of what was stacked."""

    @property
    def targets(self) -> Tensor:
        """Rows of the batch in the order of `results`."""
        return self.results(self.rows)

    def taken(self, t: Tensor) -> Tensor:
        """(batch, …) as (N, R, …)."""
        return t.unflatten(0, self.rows.shape) if self.whole else t[self.rows]

    def results(self, t: Tensor) -> Tensor:
        """What was computed for (N, R, …) as (rows, …)."""
        flat = t.flatten(0, 1)
        return flat if self.kept is None else flat[self.kept]

    def run(self, inlay: Inlay, act: Act, *given: Any) -> Any:
        """`act` of every adapter on what is given for its rows, (N, R, …) each, as its results are."""
        if len(self.names) == 1:
            with inlay.narrowed(self.rows[0]):
                return inside(lambda t: t[None], act(*inside(lambda t: t[0], given)))

        column = Column(self.levels)

        def one(tensors: dict[str, Tensor], rows: Tensor, *given: Any) -> Any:
            with inlay.narrowed(rows):
                return functional_call(column, tensors, (act, *given))

        return torch.vmap(one, randomness="different")(self.stacked(), self.rows, *given)

    def stacked(self) -> dict[str, Tensor]:
        """The tensors of what is computed N times, (N, …) each, without those that all adapters share.

        The adapters' own are stacked once while they are not trained; those of rows are taken from there each time.
        """
        now = [] if torch.is_grad_enabled() else [stamp(t) for tensors in self.tensors for t in tensors.values()]
        if not now or now != self.stamps:
            several = {name for name, t in self.tensors[0].items() if any(one[name] is not t for one in self.tensors)}
            self.stack = {name: torch.stack([one[name] for one in self.tensors]) for name in several}
            self.stamps = now
        return self.stack if self.owners is None else {name: t[self.owners] for name, t in self.stack.items()}


class Router:
    """What happens at one module while rows of the batch are routed."""

    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        self.served = False
        """Whether a routed forward has come through here."""
        self.plan: tuple[Any, ...] = ()
        self.found: list[Group] = []

    def enter(self, frame: Frame, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The inputs of rows whose adapter acts on inputs."""
        mount = self.mount
        if not any(name in mount.levels for name in mount.inlay.routes or ()):
            return None
        x = self.spread(self.checked(first(args, kwargs)))
        if torch.is_grad_enabled():
            self.forget()  # methods in training draw anew (ranks, parts that rest): what was alike may differ now
        for group in self.groups(x.shape[0]):
            if any(level.method.acts_before for level in group.levels) and not reads_tensors(group.levels):
                frame.routed[group], changed = group.run(mount.inlay, partial(descend, group.levels), group.taken(x))
                x = x.index_copy(0, group.targets, group.results(changed))
        return replace_first(args, kwargs, x) if frame.routed else None

    def leave(self, frame: Frame, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The base's output with the rows of every routed adapter replaced by what that adapter gives."""
        self.served = True
        whole = first_output(output)
        output = replace_first_output(output, self.spread(whole))
        batch = first_output(output).shape[0]
        for group in self.groups(batch):
            if reads_tensors(group.levels):
                part = self.rerun(module, args, kwargs, group, whole.shape[0])
                output = with_rows(output, group.targets, part, batch)
                continue
            y = first_output(output)
            inputs = self.inputs(frame, group, first(args, kwargs))
            part = group.run(self.mount.inlay, partial(climb, frame, group.levels), inputs, group.taken(y))
            frame.read.clear()  # what one adapter gives is not what the next one does
            part = group.results(part).to(y.dtype)
            output = replace_first_output(output, part if group.whole else y.index_copy(0, group.targets, part))
        return output

    def inputs(self, frame: Frame, group: Group, x: Tensor) -> list[Tensor]:
        """The input of each of a group's levels, (N, R, …)."""
        below = frame.routed.get(group)
        return [
            group.taken(self.spread(self.mount.input_of(level, x))) if below is None or level.site.entry else below[k]
            for k, level in enumerate(group.levels)
        ]

    def rerun(self, module: nn.Module, args: tuple, kwargs: dict, group: Group, batch: int) -> Any:
        """The module on the rows of one adapter (those of arguments with `batch` rows) as if it were the only one."""
        mount, inlay, (name,), rows = self.mount, self.mount.inlay, group.names, group.rows[0]
        if any(kwargs.get(cache) is not None for cache in CACHES):
            raise RouteError(f"'{mount.path}' would write its cache twice: rows cannot be routed there with a cache")
        if batch > 1 or len(inlay.routes or ()) == 1:
            args, kwargs = some_rows(args, rows, batch), some_rows(kwargs, rows, batch)
        depth = len(mount.frames)
        try:
            with inlay.only(name), inlay.narrowed(rows):
                args, kwargs = mount.enter(module, args, kwargs) or (args, kwargs)
                output = type(module).forward(module, *args, **kwargs)
                changed = mount.leave(module, args, kwargs, output)
        finally:
            del mount.frames[depth:]
        return output if changed is None else changed

    def spread(self, t: Tensor) -> Tensor:
        """One row that serves the whole batch (position embeddings) as one row each."""
        n = len(self.mount.inlay.routes or ())
        return t.expand(n, *t.shape[1:]) if t.shape[0] == 1 and n > 1 else t

    def checked(self, x: Tensor) -> Tensor:
        """x, or RouteError where the batch is not its first axis."""
        path, owner = self.mount.path, self.mount.owner
        if isinstance(owner, nn.MultiheadAttention) and not owner.batch_first:
            raise RouteError(f"'{path}' has its batch on the second axis: use batch_first=True to route rows")
        if x.is_nested:
            raise RouteError(
                f"'{path}' is given a nested tensor, whose rows cannot be routed: "
                "build nn.TransformerEncoder with enable_nested_tensor=False"
            )
        return x

    # ------------------------------------------------------------------ which adapters act together
    def groups(self, batch: int) -> list[Group]:
        """The routed adapters that have something here, those that are alike together; found once per `route`."""
        inlay = self.mount.inlay
        plan = (inlay.routes, batch, inlay.training)
        if not self.plan or self.plan[0] is not plan[0] or self.plan[1:] != plan[1:]:
            alike: dict[Any, list[tuple[str, Tensor]]] = {}
            for name, rows in inlay.route_groups(batch, self.mount.path):
                if levels := self.mount.levels.get(name):
                    alike.setdefault(kind(name, levels, len(rows)), []).append((name, rows))
            self.plan, self.found = plan, [self.group(found, batch) for found in alike.values()]
        return self.found

    def group(self, found: list[tuple[str, Tensor]], batch: int) -> Group:
        """These adapters and their rows: row by row, or adapter by adapter where each has something to form first."""
        names, every = [name for name, _ in found], [self.mount.levels[name] for name, _ in found]
        lengths, most = [len(rows) for _, rows in found], max(len(rows) for _, rows in found)
        rows = torch.stack([torch.cat([r, r[:1].expand(most - len(r))]) for _, r in found])
        owners = kept = None
        if min(lengths) < most:
            kept = torch.cat([torch.arange(n, device=rows.device) + i * most for i, n in enumerate(lengths)])
        if not (in_order(rows, batch) or forms(every[0]) or len(found) == 1):
            kept, (flat, order) = None, torch.cat([rows for _, rows in found]).sort()
            owner = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], device=rows.device)
            rows, owners = flat[:, None], owner[order]
        tensors = [tensors_of(levels) for levels in every]
        return Group(names, every[0], tensors, owners, rows, kept, kept is None and in_order(rows, batch))

    def forget(self) -> None:
        """Let go of stacked tensors."""
        self.plan, self.found = (), []


def in_order(rows: Tensor, batch: int) -> bool:
    """Whether rows are those of the batch as they lie."""
    return rows.flatten().tolist() == list(range(batch))


def tensors_of(levels: list[Level]) -> dict[str, Tensor]:
    """The tensors of an adapter's methods by their names in a `Column`."""
    return {
        f"methods.{k}.{name}": t
        for k, level in enumerate(levels)
        for tensors in (level.method.named_parameters(), level.method.named_buffers())
        for name, t in tensors
    }


def reads_tensors(levels: list[Level]) -> bool:
    """Whether an adapter acts through tensors that the module reads, so that the module must run for its rows."""
    return not all(acts_on_output(level) for level in levels)


def forms(levels: list[Level]) -> bool:
    """Whether an adapter has to form matrices before it acts, which is better done once than for every row."""
    for level in levels:
        method, update = level.method, None
        if isinstance(method, WeightMethod):
            update = method.update()
            if update is None and max((p.dim() for p in method.parameters()), default=0) > 1:
                return True  # rotations, norms: from more than vectors
        if update is not None and update.flops(0) > 0:
            return True
    return False


def kind(name: str, levels: list[Level], rows: int) -> tuple[Any, ...]:
    """What adapters have to have in common to act together; the adapter's own name where it acts alone."""
    if torch.compiler.is_compiling() or reads_tensors(levels) or not all(stackable(level.method) for level in levels):
        return (name,)
    size = rows.bit_length() if forms(levels) else 0  # not too many rows are filled up
    return size, *(
        (level.site.key, frozenset(level.site.uses), *(looks(part) for part in level.method.modules()))
        for level in levels
    )


def stackable(method: Method) -> bool:
    """Whether its tensors are all its own, and its equation can be batched over them."""
    return method.stacks and not any(part.shares for part in method.modules() if isinstance(part, Method))


def looks(module: nn.Module) -> tuple[Any, ...]:
    """A module's class, plain attributes, and the shapes of its tensors."""
    attributes = [
        (name, value if isinstance(value, Hashable) and not isinstance(value, tuple) else repr(value))
        for name, value in vars(module).items()
        if (name not in OWN or name == "training") and name != "_site"
    ]
    tensors = [*module._parameters.items(), *module._buffers.items()]
    shapes = [(name, None if t is None else (t.shape, t.dtype)) for name, t in tensors]
    return type(module), tuple(attributes), tuple(shapes)


def stamp(t: Tensor) -> tuple[int, int]:
    """Changes with the numbers of a tensor."""
    return t.data_ptr(), 0 if t.is_inference() else t._version


def inside(change: Act, value: Any) -> Any:
    """The same with every tensor of lists and tuples changed."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(inside(change, item) for item in value)
