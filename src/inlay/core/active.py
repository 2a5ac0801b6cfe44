"""What one does with a model that has adapters: switch, route, detach, and tell them that a step was taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inlay.core.container import Inlay
from inlay.core.errors import AdapterError, RouteError
from inlay.core.method import Method
from inlay.core.modes import evaluating
from inlay.core.properties import hold_statistics, release_statistics
from inlay.core.stacking import check_stack

if TYPE_CHECKING:
    pass


def container(model: nn.Module) -> Inlay:
    """`model.inlay`, made on first use."""
    existing = model._modules.get("inlay")
    if isinstance(existing, Inlay):
        return existing
    if existing is not None or "inlay" in model.__dict__:
        raise AdapterError("the model already has an attribute 'inlay' that is not ours")
    inlay = Inlay(model)
    inlay.state.trained = {n: p.requires_grad for n, p in model.named_parameters()}
    inlay.train(model.training)
    model.add_module("inlay", inlay)
    hold_statistics(model)
    return inlay


def attached(model: nn.Module) -> Inlay:
    """`model.inlay`; AdapterError when nothing is attached."""
    inlay = model._modules.get("inlay")
    if not isinstance(inlay, Inlay):
        raise AdapterError("no adapter is attached to this model: call inlay.adapt or inlay.load first")
    return inlay


def activate(inlay: Inlay, names: Sequence[str]) -> None:
    """Let exactly these adapters act, in this order; only their tensors ask for gradients."""
    inlay.resume()
    merged = inlay.state.merged_names
    for name in names:
        if inlay.check(name) in merged:
            raise AdapterError(f"'{name}' is merged into the base: it acts already, unmerge it to switch it")
    if len(set(names)) < len(names):
        raise AdapterError(f"an adapter acts once at most, got {list(names)}")
    check_stack(inlay, [*merged, *names])
    inlay.state.active = list(names)
    for name in [*(inlay.state.asking - {*names}), *names]:
        for p in inlay.adapters[name].parameters():
            p.requires_grad_(name in names and p.is_floating_point())
    inlay.state.asking = {*names}


# ---------------------------------------------------------------------- on the model
def use(model: nn.Module, *names: str) -> None:
    """Switch to these adapters, stacked in the order given; none switches all off. No tensor moves.

    Of several task heads the last one's acts. Raises AdapterError on names that are unknown, repeated or merged, and
    ComposeError where an adapter cannot stand on those before it.
    """
    activate(attached(model), names)


@contextmanager
def unadapted(model: nn.Module) -> Iterator[None]:
    """The plain base, whether or not anything is attached to it, for as long as the context lasts."""
    existing = model._modules.get("inlay")
    with existing.only() if isinstance(existing, Inlay) else nullcontext():
        yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The plain base model, for as long as the context lasts."""
    with attached(model).only():
        yield


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Send each row of the batch to its own adapter (None: the plain base), `route(model, ["a", None, "b"])`.

    Raises:
        AdapterError: an unknown name.  RouteError: a batch whose rows are not as many, a module that mixes rows, or a
        method whose tensors are read outside any forward, so that rows cannot be kept apart.
    """
    inlay = attached(model)
    for name in names:
        if name is not None:
            inlay.check(name)
    if not names:
        raise RouteError("route needs one adapter name (or None) per row of the batch")
    inlay.resume()
    before = inlay.state.routes
    inlay.state.routes = list(names)
    try:
        yield
    finally:
        inlay.state.routes = before
        for mount in inlay.state.mounts.values():
            mount.router.forget()


def delete(model: nn.Module, name: str) -> None:
    """Remove one adapter and free its tensors; AdapterError while it is merged."""
    inlay = attached(model)
    if inlay.check(name) in inlay.state.merged_names:
        raise AdapterError(f"'{name}' is merged into the base: unmerge first, or detach(model, keep_merged=True)")
    inlay.drop(name)


def detach(model: nn.Module, keep_merged: bool = False) -> None:
    """Remove every adapter; the model's tree, keys, tensors and gradient flags are as before.

    Args:
        keep_merged: leave what is merged in the base's tensors, which makes an ordinary merged model; otherwise the
            base's own tensors return first.
    """
    inlay = attached(model)
    if inlay.state.merged_names and not keep_merged:
        from inlay.core.merge import unmerge

        unmerge(model)
    trained = inlay.state.trained
    inlay.close()
    del model._modules["inlay"]
    release_statistics(model)
    for n, p in model.named_parameters():
        p.requires_grad_(trained.get(n, True))


def penalty(model: nn.Module) -> Tensor | float:
    """The sum of the active methods' regularisers, to be added to the loss; 0.0 where none has one."""
    terms = [t for method in active_methods(model) if (t := method.penalty()) is not None]
    return torch.stack(terms).sum() if terms else 0.0


def step(
    model: nn.Module,
    progress: float,
    optimizer: Optimizer | None = None,
    loss: Callable[[], Tensor | float] | None = None,
) -> None:
    """Tell the active methods that an optimizer step was taken; `progress` runs from 0 to 1.

    Call it after `optimizer.step()` and before `optimizer.zero_grad()`: methods that measure importance read gradients,
    those that begin anew (ReLoRA) change the optimizer's moments. Methods that compare losses (IST) want `loss`, a
    function that computes that of a batch again: it is called in evaluation mode, without gradients.
    """
    methods = active_methods(model)
    for method in methods:
        method.step(progress, optimizer)
    for method in methods:
        method.probe(None if loss is None else partial(loss_now, model, loss))


@torch.no_grad()
def loss_now(model: nn.Module, loss: Callable[[], Tensor | float]) -> float:
    """A loss in evaluation mode, its mean over processes that train together; leaves all modes as they are."""
    with evaluating(model):
        found = torch.as_tensor(loss(), dtype=torch.float32)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(found)
        found = found / torch.distributed.get_world_size()
    return float(found)


def active_methods(model: nn.Module) -> list[Method]:
    """Built methods of the active adapters, each once, with the methods they are made of."""
    inlay = attached(model)
    levels = [level for name in inlay.active for level in inlay.levels(name)]
    methods = {id(m): m for level in levels for m in level.method.modules() if isinstance(m, Method)}
    return [*methods.values(), *inlay.companions()]
