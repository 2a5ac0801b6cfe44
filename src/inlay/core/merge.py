"""Merging: an adapted network written as the base network with other tensors, proved equal, undone bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inlay.core.active import activate, attached
from inlay.core.calls import first_output
from inlay.core.errors import MergeError
from inlay.core.hosts import ConvHost, EmbeddingHost, NormHost, QuantisedHost, host_of
from inlay.core.levels import Level, applies_matrix, has_closed_form, kept
from inlay.core.method import ParameterMethod
from inlay.core.mount import Mount
from inlay.core.quantised import Storage, dense, is_quantised, plain
from inlay.core.rotary import Rotary
from inlay.core.sharded import is_spread
from inlay.core.stacking import check_stack

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest accepted difference between adapted and merged outputs, relative to the largest output."""


PROBES = 4
"""Random vectors that a linear layer is proved on: an entry of W that is wrong shows in each."""


@dataclass(frozen=True)
class Merged:
    """What a merge came to."""

    difference: float
    """The largest relative difference between each module's adapted and merged output on a random probe."""
    rounding: dict[str, float]
    """By path of each layer that was quantised again, ‖Q − W′‖ / ‖W′‖, Frobenius; empty unless that was asked for."""

    @property
    def mean(self) -> float:
        """Mean error of quantising again."""
        return sum(self.rounding.values()) / max(1, len(self.rounding))

    @property
    def worst(self) -> float:
        """The largest of them."""
        return max(self.rounding.values(), default=0.0)


@torch.no_grad()
def merge(model: nn.Module, *names: str, dequantise: bool = False, requantise: bool = False) -> Merged:
    """Fold adapters (the active ones when none is named) into the base's tensors.

    Each new tensor is computed in float32 at least and rounded once; the base's own tensors are set aside and
    `unmerge` puts the very same ones back. What is merged is proved equal on a random probe of every module.

    Args:
        dequantise: let ordinary linear layers, in the type the base computes in, stand in for quantised ones until
            `unmerge`. Without it a quantised base is refused: rounding W′ to few bits again would change what it is.
        requantise: round all the same, each layer to the storage it had, after the proof; what that costs is returned.

    Raises:
        MergeError: a method without closed form, a quantised base, or a difference above the tolerance of the base's
        type (the model is then as it was before).
    """
    inlay = attached(model)
    names = tuple(inlay.check(n) for n in names) or tuple(inlay.active)
    if inlay.state.merged_names:
        raise MergeError("adapters are merged already: unmerge first")
    if not names:
        raise MergeError("no adapter is active: name those to merge")
    check_stack(inlay, names)
    for name in names:
        if is_spread(inlay.adapters[name]):
            raise MergeError(
                f"'{name}' is spread over processes: save it, and merge it where one process holds the model"
            )
    stacks = {mount: [lv for n in names for lv in mount.levels.get(n, ())] for mount in inlay.state.mounts.values()}
    stacks = {mount: levels for mount, levels in stacks.items() if levels}
    refuse([lv for n in names for lv in inlay.levels(n)], dequantise, requantise)
    modes = {module: module.__dict__["training"] for module in model.modules()}
    active = inlay.state.active
    model.eval()
    worst = 0.0
    ties: dict[int, nn.Parameter] = {}
    try:
        inlay.state.factored = True
        inlay.state.merged_names, inlay.state.active_before = names, active
        # module by module: its tensors are at hand for the proof, and no second copy of the model is made
        for mount, levels in stacks.items():
            with inlay.only(*names), inlay.state.still.holding():
                before, tensors = probe(mount), merged_tensors(mount, levels)
            put(model, mount, levels, tensors, ties)
            with inlay.only():
                found = difference(before, probe(mount))
            limit = max((TOLERANCE.get(t.dtype, 0.0) for t in tensors.values()), default=0.0)
            if not found <= limit:
                raise MergeError(
                    f"merged and adapted outputs of '{mount.path}' differ by {found:.2e} (tolerance {limit:.0e}): "
                    "nothing merged"
                )
            worst = max(worst, found)
        for rotary in rotaries(model):
            rotary.merge(names)
        activate(inlay, [n for n in active if n not in names])
        rounding = quantised_again(model) if requantise else {}
    except BaseException:
        if inlay.state.merged_names:
            unmerge(model)
        raise
    finally:
        inlay.state.factored = False
        for module, mode in modes.items():
            module.training = mode
        for path, module in inlay.state.swapped.items():
            model.get_submodule(path).training = module.training
    return Merged(worst, rounding)


def put(
    model: nn.Module, mount: Mount, levels: list[Level], tensors: dict[str, Tensor], ties: dict[int, nn.Parameter]
) -> None:
    """Let a module's merged tensors take the places of the base's, which are set aside.

    `ties` knows what took the place of which, so that trained copies of tied tensors stay tied.
    """
    state, module = attached(model).state, mount.module
    if is_quantised(module) and "weight" in tensors:
        bias = tensors.get("bias", module._parameters.get("bias"))
        state.swapped[mount.path] = module
        exchange(model, module, plain(module, tensors["weight"], bias))
        return
    only_copies = all(isinstance(level.method, ParameterMethod) for level in levels)
    for name, t in tensors.items():
        if name in module._buffers:
            state.merged[(mount.path, name)], module._buffers[name] = module._buffers[name], t
            continue
        old = module._parameters[name]
        assert old is not None
        new = ties.get(id(old)) if only_copies else None
        new = nn.Parameter(t, requires_grad=False) if new is None else new
        ties[id(old)] = new
        state.merged[(mount.path, name)] = old
        module._parameters[name] = new


def exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put another module in the place of one, everywhere in the model and for the adapters that are mounted on it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    for mount in attached(model).state.mounts.values() if "inlay" in model._modules else ():
        if mount.module is old:
            mount.remove()
            mount.module = mount.owner = new
            for level in (level for levels in mount.levels.values() for level in levels):
                level.site.module = new
                if level.site.param == "weight":
                    level.site.host = host_of(new)
            mount.refresh()


def quantised_again(model: nn.Module) -> dict[str, float]:
    """Store the dense layers that stand in for quantised ones as those were stored; relative errors by path."""
    errors = {}
    for path, before in attached(model).state.swapped.items():
        standing = model.get_submodule(path)
        assert isinstance(before, Storage)
        assert isinstance(standing, nn.Linear)
        W = standing._parameters["weight"]
        assert W is not None
        stored = before.alike(plain(before, W.detach(), standing._parameters["bias"]))
        exchange(model, standing, stored.train(standing.training))
        errors[path] = float((dense(stored) - W).norm() / W.norm().clamp_min(1e-30))
    return errors


def unmerge(model: nn.Module) -> None:
    """Undo the last merge: the base's own tensors return, the adapters act again."""
    inlay = attached(model)
    state = inlay.state
    if not state.merged_names:
        raise MergeError("nothing is merged")
    for path, module in state.swapped.items():
        merged = model.get_submodule(path)
        exchange(model, merged, module.train(merged.training))
    for (path, name), tensor in state.merged.items():
        module = model.get_submodule(path)
        (module._parameters if name in module._parameters else module._buffers)[name] = tensor
    for rotary in rotaries(model):
        rotary.unmerge()
    state.merged, state.swapped, state.merged_names = {}, {}, ()
    activate(inlay, [name for name in state.active_before if name in inlay.adapters])


def rotaries(model: nn.Module) -> list[Rotary]:
    """The rotary embeddings that methods act on."""
    return [mount for mount in attached(model).state.tokens.values() if isinstance(mount, Rotary)]


def refuse(levels: Iterable[Level], dequantise: bool, requantise: bool) -> None:
    """MergeError naming the first method that has no closed form, or the first quantised layer."""
    for level in levels:
        if not type(level.method).mergeable:
            raise MergeError(
                f"{level.method.label()} at '{level.site.path}' cannot be merged: {type(level.method).unmergeable}"
            )
        quantised = isinstance(level.site.host, QuantisedHost)
        if quantised and requantise and not isinstance(level.site.module, Storage):
            raise MergeError(
                f"'{level.site.path}' ({type(level.site.module).__name__}) can be read but not written by inlay: merge "
                "with dequantise=True, and quantise what comes out with the library that made it"
            )
        if quantised and not (dequantise or requantise):
            raise MergeError(
                f"'{level.site.path}' is quantised: what is merged into it would be rounded away. Keep the adapter "
                "beside it, or merge with dequantise=True, which puts dense layers in its place, or with "
                "requantise=True, which rounds and says what it cost"
            )


def merged_tensors(mount: Mount, levels: list[Level]) -> dict[str, Tensor]:
    """The new tensors of one module, computed wide and rounded once."""
    assert all(has_closed_form(level.method) for level in levels)
    names = {lv.site.param for lv in levels} | {lv.site.bias_name for lv in levels if lv.method.acts_on_bias}
    tensors = {}
    for name in sorted(names):
        quantised = name == "weight" and is_quantised(mount.module)
        old = dense(mount.module) if quantised else mount.module._parameters.get(name)
        if old is None:
            continue
        wide = mount.fold(name, levels, old.detach().to(torch.promote_types(old.dtype, torch.float32)))
        assert wide is not None
        tensors[name] = of_its_own(wide.to(old.dtype), [old, *(t for level in levels for t in held(level))])
    return tensors | {name: t.clone() for level in levels for name, t in kept(level).items()}


def held(level: Level) -> list[Tensor]:
    """The tensors of a level's method, those included that it shares with others."""
    inlay, site = level.site.inlay, level.site
    shared = [] if inlay is None else [inlay.tensors._buffers[name] for name in site.uses]
    return [t for t in (*level.method.parameters(), *level.method.buffers(), *shared) if t is not None]


def of_its_own(t: Tensor, others: list[Tensor]) -> Tensor:
    """t, contiguous, in memory that is no other tensor's and no larger than it."""
    storage = t.untyped_storage()
    fresh = all(storage.data_ptr() != other.untyped_storage().data_ptr() for other in others)
    return t if fresh and t.is_contiguous() and storage.nbytes() == t.nbytes else t.contiguous().clone()


def probe(mount: Mount) -> Tensor | None:
    """The module's output on a fixed random input; None where its forward does not apply its tensors by itself."""
    levels = [lv for stack in mount.levels.values() for lv in stack]
    levels = [lv for lv in levels if applies_matrix(lv)]
    if not levels or mount.owner is not mount.module:
        return None
    site, module = levels[0].site, mount.module
    generator = torch.Generator("cpu").manual_seed(0)
    p = site.weight if isinstance(site.host, QuantisedHost) else site.parameter
    if isinstance(site.host, EmbeddingHost):
        x = torch.randint(p.shape[0], (64,), generator=generator).to(p.device)
    elif isinstance(site.host, ConvHost):
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        extent = [
            2 * d * (k - 1) + s + 4 for k, d, s in zip(module.kernel_size, module.dilation, module.stride, strict=True)
        ]
        x = torch.randn(2, module.in_channels, *extent, generator=generator).to(p.device, p.dtype)
    elif isinstance(site.host, NormHost):
        x = torch.randn(8, p.numel(), *[3] * site.host.axes, generator=generator).to(p.device, p.dtype)
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            x = x.unsqueeze(-1) if isinstance(module, nn.BatchNorm2d) else x[..., None, None]
    else:
        assert site.host is not None
        x = torch.randn(PROBES, site.host.to_matrix(p).shape[1], generator=generator).to(p.device, p.dtype)
    return first_output(module(x))


def difference(a: Tensor | None, b: Tensor | None) -> float:
    """max |a − b| relative to max |a|."""
    if a is None or b is None:
        return 0.0
    return float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-12))
