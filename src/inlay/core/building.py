"""Building an adapter's methods at their sites, all of them or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from inlay.core.active import activate, attached, detach
from inlay.core.base import base_parameters
from inlay.core.companion import Companion
from inlay.core.container import Inlay
from inlay.core.errors import AdapterError, OptionError, SiteError
from inlay.core.head import Head
from inlay.core.method import Method, Placement, method_from
from inlay.core.sharded import is_sharded
from inlay.core.sites import Site
from inlay.core.stacking import compose
from inlay.core.where import Finder, Pattern, matches


def build(
    model: nn.Module,
    inlay: Inlay,
    name: str,
    plans: Sequence[tuple[Placement, list[Site]]],
    overrides: dict[str, dict[str, Any]],
    seed: int,
    companions: Sequence[Companion],
) -> None:
    """Build every method at its sites, with the options that differ there."""
    used = set()
    pairs: list[tuple[Method, Site]] = []
    for placement, sites in plans:
        for site in sites:
            changes: dict[str, Any] = {}
            for pattern, options in ({**overrides, **placement.overrides}).items():
                if not isinstance(placement.method, Head) and matches(pattern, site):
                    used.add(pattern)
                    changes |= options
            pairs.append((placement.method.replace(**changes) if changes else placement.method, site))
    unused = [pattern for pattern in overrides if pattern not in used]
    if unused:
        raise OptionError(f"overrides match no adapted site: {unused}")
    peers = [site for method, site in pairs if not isinstance(method, Head)]
    pairs += [(c, Site("", model, key=c.name(), peers=peers)) for c in companions]
    build_sites(model, inlay, name, pairs, seed)


def build_sites(model: nn.Module, inlay: Inlay, name: str, pairs: Sequence[tuple[Method, Site]], seed: int) -> None:
    """Build each method at its site and switch the adapter on; call it inside `undone_on_error`."""
    acting = [p for other in inlay.active for p in inlay.adapters[other].parameters()]
    if any(is_sharded(p) for p in (*base_parameters(model), *acting)):
        raise AdapterError("the model is spread over processes already: attach adapters first, then call fully_shard")
    with torch.random.fork_rng(devices=[]), inlay.only():  # methods read the base as it is, whatever acts on it
        torch.manual_seed(seed)
        inlay.adapters[name] = nn.ModuleDict()
        for spec, site in pairs:
            site.inlay = inlay
            method = placed(spec.at(site), site.parameter_device)
            compose(inlay, name, site, method)
            inlay.put(model, name, site, method)
    placed(inlay.tensors, inlay.device)
    inlay.adapters[name].train(model.training)
    inlay.refresh()
    for p in base_parameters(model):
        p.requires_grad_(False)
    activate(inlay, [name])


T = TypeVar("T", bound=nn.Module)


def placed(module: T, device: torch.device) -> T:
    """The module on that device; left alone where it is there already, as tensors without storage must be."""
    tensors = (*module.parameters(), *module.buffers())
    return module if all(t.device == device for t in tensors) else module.to(device)


@contextmanager
def undone_on_error(model: nn.Module, name: str) -> Iterator[None]:
    """Take the adapter `name` off again, and what it made, when the context ends with an error."""
    existing = model._modules.get("inlay")
    active = list(existing.active) if isinstance(existing, Inlay) else []
    try:
        yield
    except BaseException:
        inlay = model._modules.get("inlay")
        if isinstance(inlay, Inlay):
            if name in inlay.adapters:
                inlay.drop(name)
            activate(inlay, active)
            discard(model)
        raise


def discard(model: nn.Module) -> None:
    """Take the container off again when nothing is in it."""
    if not attached(model).adapters:
        detach(model)


def parts_of(placement: Placement, where: Sequence[Pattern] | None) -> tuple[Placement, ...]:
    """A method and those that belong to it at places of their own."""
    beside = placement.method.beside()
    if beside and (placement.where or where):
        kinds = ", ".join(type(p.method).__name__ for p in beside)
        raise SiteError(
            f"{placement.method.label()} brings {kinds} with it, each to its own places: leave `where` out, or give it "
            "options without them and list them yourself, with `.on(…)`"
        )
    return (placement, *beside)


def place(method: Method | Placement | str | dict) -> Placement:
    return method if isinstance(method, Placement) else Placement(method_from(method))


def check_name(inlay: nn.Module | None, name: str) -> None:
    """AdapterError where no adapter of that name can be attached now to a model with this `model.inlay`, if any."""
    if not name or "." in name or name in dir(nn.ModuleDict):
        raise AdapterError(f"'{name}' cannot name an adapter: use letters, digits, '-' and '_'")
    if not isinstance(inlay, Inlay):
        return
    if name in inlay.adapters:
        raise AdapterError(f"an adapter '{name}' is attached already: delete it or choose another name")
    if inlay.state.merged_names:
        raise AdapterError(
            f"{list(inlay.state.merged_names)} are merged into the base: unmerge first, or "
            "detach(model, keep_merged=True) to go on from the merged tensors"
        )


def find_head(finder: Finder) -> tuple[str, ...]:
    """Modules of the task head of a classification or regression model; none for bare backbones and language models."""
    kind = type(finder.model).__name__
    if not kind.endswith(("Classification", "QuestionAnswering", "MultipleChoice")):
        return ()
    backbone = finder.anatomy.backbone
    if not backbone:
        return ()
    first = backbone.split(".")[0]
    return tuple(
        path for path, module in finder.model.named_children()
        if path not in (first, "inlay") and any(True for _ in module.parameters())
    )  # fmt: skip
