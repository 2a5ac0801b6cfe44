"""LoftQ: a base quantised for the low-rank update that will be trained on it (Li et al. 2023, arXiv 2310.08659).

Where a base is only rounded, W ≈ Q, the update starts with the error of rounding against it. Here both are fitted in
turn: Q = q(W − ΔW), then ΔW = the nearest matrix of rank r to W − Q. Training starts from Q + ΔW, nearer to W than Q
alone. The factors take √(Σ/s) each, so it holds for every scale s of the update, not for s = 1 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from inlay.core.active import activate, attached
from inlay.core.adapter import Adapter
from inlay.core.base import base_modules
from inlay.core.checkpoint import read, site_from
from inlay.core.container import Made
from inlay.core.errors import AdapterError, CheckpointError, OptionError
from inlay.core.merge import exchange
from inlay.core.method import WeightMethod
from inlay.core.quantised import dense, is_quantised, plain
from inlay.core.sites import Site
from inlay.core.spectrum import svd
from inlay.core.stacking import overlapping
from inlay.models.quantise import check_kind, linear_layers, quantised

Store = Callable[[nn.Linear], nn.Module]
Factors = tuple[Tensor, Tensor]
"""ΔW of one place as B (d_out, r) and A (r, d_in), float32."""


@torch.no_grad()
def loftq(adapter: Adapter, kind: str = "nf4", iterations: int = 5, group: int | None = None) -> dict[str, list[float]]:
    """Quantise the base of an adapter that was just attached, and let its low-rank updates begin at what is lost.

    The model's linear layers are replaced by quantised ones, in place and for good: those the adapter updates as LoftQ
    says, the others rounded. The adapter's file then brings what the base was made with; `loftq_base` makes it again.

    Args:
        adapter: attached to a base in full, the only one there, with a method whose update is a product B A (LoRA,
            LoRA-FA, AdaLoRA, DoRA and others over one of these).
        kind, group: as for `inlay.models.quantise.quantise`.
        iterations: T, how often to fit both; with 1 the base is that of `quantise`.

    Returns:
        By path of each layer, ‖W − Q − ΔW‖ / ‖W‖: rounded alone, then after every iteration. The last one that lowers
        the error counts, so there may be fewer than asked for.

    Raises:
        OptionError: an unknown kind, or a method whose update cannot be set.  AdapterError: a base quantised already,
        another adapter beside it, or one that is merged.
    """
    model, inlay = adapter.model, attached(adapter.model)
    check_kind(kind, group)
    if iterations < 1:
        raise OptionError(f"LoftQ has at least 1 iteration, got {iterations}")
    if list(inlay.adapters) != [adapter.name] or inlay.state.merged_names:
        raise AdapterError("LoftQ changes the base for one adapter: it must be the only one attached, and not merged")
    if any(is_quantised(module) for module in model.modules()):
        raise AdapterError("the base is quantised already: LoftQ needs its own numbers, so open it in full")
    active = list(inlay.active)
    activate(inlay, [])
    for mount in inlay.everything:
        mount.remove()
    try:
        layers = linear_layers(model, adapter.head)
        fitting = updates(adapter, layers)
        store = partial(quantised, kind=kind, group=group)
        errors: dict[str, list[float]] = {}
        before: dict[str, Tensor] = {}
        for path, layer in layers.items():
            places = fitting.get(path, [])
            sites = [site for _, site in places]
            fitted = alternate(layer, sites, [method.triplets() for method, _ in places], store, iterations)
            exchange(model, layer, fitted.layer)
            errors[path] = fitted.errors
            for (method, _), triplets in zip(places, fitted.triplets, strict=True):
                method.begin_at(*triplets)
            for site, factors in zip(sites, fitted.before, strict=False):  # none after a single iteration
                before |= {f"{site.key}.{name}": t.cpu() for name, t in zip("BA", factors, strict=True)}
    finally:
        inlay.refresh()
        activate(inlay, active)
    inlay.state.made[adapter.name] = Made({"kind": kind, "group": group, "iterations": iterations}, before)
    return errors


@torch.no_grad()
def loftq_base(model: nn.Module, folder: str | Path) -> list[str]:
    """Quantise a base in full as it was for the adapter that is saved in a folder; `inlay.load` comes after.

    Returns the paths of the quantised layers; none, and the base as it was, for an adapter without LoftQ.

    Raises:
        CheckpointError: a damaged folder, or a model that lacks its layers or is quantised already.
    """
    document, tensors = read(folder)
    about = document["base"].get("loftq")
    if about is None:
        return []
    if "inlay" in model._modules or any(is_quantised(module) for module in model.modules()):
        raise CheckpointError(f"{folder} needs its base in full, with nothing attached yet, to quantise it again")
    store = partial(quantised, kind=about["kind"], group=about["group"])
    before: dict[str, list[tuple[Site, Factors]]] = {}
    modules = base_modules(model)
    for record in document["sites"]:
        names = [f"base.{record['key']}.{name}" for name in "BA"]
        if names[0] in tensors:
            site = site_from(model, modules, record, Path(folder))
            B, A = (tensors[name].to(site.parameter_device) for name in names)
            before.setdefault(site.path, []).append((site, (B, A)))
    layers = linear_layers(model, document["head"])
    for path, layer in layers.items():
        pairs = before.get(path, [])
        exchange(model, layer, store(without(layer, [s for s, _ in pairs], [f for _, f in pairs])))
    return list(layers)


def base_bytes(adapter: Adapter) -> int:
    """Bytes of what an adapter's file holds to make its base again, where a second iteration lowers every error."""
    layers = {path: module for path, module in adapter.model.named_modules() if is_quantised(module)}
    places = [place for found in updates(adapter, layers).values() for place in found]
    return sum(4 * method.triplets() * sum(site.shape) for method, site in places)


def updates(adapter: Adapter, layers: Mapping[str, nn.Module]) -> dict[str, list[tuple[WeightMethod, Site]]]:
    """The methods whose update can be set, with their places in these layers; OptionError where there are none.

    Of several at one place the first is taken.
    """
    found: dict[str, list[tuple[WeightMethod, Site]]] = {path: [] for path in layers}
    for level in adapter.levels:
        method, site, here = level.method, level.site, found.get(level.site.path)
        if here is None or not isinstance(method, WeightMethod) or not method.triplets():
            continue
        if not any(overlapping(site, other) for _, other in here):
            here.append((method, site))
    if not any(found.values()):
        methods = " + ".join(p.method.label() for p in adapter.placements)
        raise OptionError(
            f"LoftQ sets an update B A of linear layers to what quantisation loses, and {methods} has none to be set"
        )
    return found


@dataclass(frozen=True)
class Fitted:
    """Where the alternation of one layer ended."""

    layer: nn.Module
    """Q, stored."""
    triplets: list[tuple[Tensor, Tensor, Tensor]]
    """U, σ and V of ΔW, by place."""
    before: list[Factors]
    """The ΔW without which W was quantised, by place; empty where W was quantised as it is."""
    errors: list[float]
    """Relative error of Q₁ alone, then of Q + ΔW after every iteration that lowered it."""


def alternate(
    layer: nn.Linear, sites: Sequence[Site], ranks: Sequence[int], store: Store, iterations: int, subspace: int = 4
) -> Fitted:
    """Quantise and decompose in turn; `subspace` as `iterations` of `inlay.core.spectrum.svd`."""
    W = layer.weight.detach().float()
    size = W.norm().clamp_min(1e-30)
    best: Fitted | None = None
    factors: list[Factors] = []
    for _ in range(iterations):
        stored = store(without(layer, sites[: len(factors)], factors)).train(layer.training)
        lost = W - dense(stored).float()
        errors = [float(lost.norm() / size)] if best is None else best.errors
        if not sites:
            return Fitted(stored, [], [], errors)
        triplets = [svd(site.matrix_of(lost), r, subspace) for site, r in zip(sites, ranks, strict=True)]
        now = [((U * S.sqrt()).contiguous(), (V * S.sqrt()).T.contiguous()) for U, S, V in triplets]
        error = float(subtracted(lost, sites, now).norm() / size)
        if best is not None and error >= errors[-1]:
            break
        best, factors = Fitted(stored, triplets, factors, [*errors, error]), now
    assert best is not None
    return best


def without(layer: nn.Linear, sites: Sequence[Site], factors: Sequence[Factors]) -> nn.Linear:
    """The layer with W − ΔW, to the same bits on every machine: computed in float64 and rounded once."""
    if not sites:
        return layer
    W = subtracted(layer.weight.detach().double(), sites, [(B.double(), A.double()) for B, A in factors])
    return plain(layer, W.to(layer.weight.dtype), layer.bias)


def subtracted(W: Tensor, sites: Sequence[Site], factors: Sequence[Factors]) -> Tensor:
    """W less B A of every place in it."""
    for site, (B, A) in zip(sites, factors, strict=True):
        W = site.stored_from(site.matrix_of(W) - B @ A, W)
    return W
