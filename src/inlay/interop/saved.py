"""What PEFT stores beside a method: whole trained modules, trained biases, and the base's token embeddings."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from inlay.core.building import find_head
from inlay.core.errors import CheckpointError
from inlay.core.head import Head
from inlay.core.levels import Level
from inlay.core.method import ParameterMethod
from inlay.core.sites import Site
from inlay.core.where import inside
from inlay.interop.family import Part, Reading, Writing, cannot
from inlay.interop.matching import modules, saved_modules
from inlay.methods.weight.bitfit import BitFit
from inlay.methods.weight.full import Full


# ---------------------------------------------------------------------- whole modules
def read_modules(reading: Reading) -> list[Part]:
    """`modules_to_save`: the task head as Head, other modules as Full. PEFT copies a module, so ties end at it."""
    heads = find_head(reading.finder)
    parts = []
    for path in saved_modules(reading.model, reading.config.get("modules_to_save") or ()):
        is_head = any(inside(path, head) for head in heads)
        parts += read_module(reading, path, Head() if is_head else Full(), path)
    return parts


def read_module(reading: Reading, path: str, method: ParameterMethod, key: str) -> list[Part]:
    """Trained copies of a module's tensors, which the folder has under `key`."""
    module = reading.model.get_submodule(path)
    for aside in [k for k in reading.left if k.startswith((f"{path}.original_module.", f"{path}.modules_to_save."))]:
        del reading.left[aside]  # with bias="all" PEFT stores these biases twice more
    # ties that leave the module are not followed: PEFT trains a copy of it
    found = reading.finder.sites(method, ["re:" + re.escape(path)], reading.dtype)
    sites = {site.key: site for site in found if inside(site.path, path)}
    values: dict[str, Tensor] = {}
    for name, _ in module.named_parameters(remove_duplicate=False):
        values[f"{path}.{name}"] = reading.take(f"{key}.{name}")
    buffers = {f"{path}.{name}": t for name, t in given_buffers(reading, path, key).items()}
    changed = {f"{path}.{name}" for name in changed_buffers(reading, path, key)}
    parts = []
    for name, site in sites.items():
        states = {state: buffers[f"{site.path}.{state}"] for state in method.follows(site)}
        changed -= {f"{site.path}.{state}" for state in states}
        parts.append(Part(method, site, {"value": values[name]} | states))
    if changed:
        raise CheckpointError(
            f"{reading.folder}: the buffer '{min(changed)}' was changed in training (running statistics), which inlay "
            f"keeps beside NormTuning, not beside {type(method).__name__}"
        )
    for name in given_buffers(reading, path, key):
        del reading.left[f"{key}.{name}"]
    return parts


def given_buffers(reading: Reading, path: str, key: str) -> dict[str, Tensor]:
    """The buffers of a module that the folder has under `key`, by their names in the module."""
    names = [name for name, _ in reading.model.get_submodule(path).named_buffers()]
    return {name: reading.left[f"{key}.{name}"] for name in names if f"{key}.{name}" in reading.left}


def changed_buffers(reading: Reading, path: str, key: str) -> list[str]:
    """Those that differ from the base's."""
    own = dict(reading.model.get_submodule(path).named_buffers())
    return [name for name, t in given_buffers(reading, path, key).items() if not torch.equal(t, own[name].cpu())]


def write_modules(writing: Writing, levels: Sequence[Level]) -> None:
    """Head and Full as `modules_to_save`; PEFT trains whole modules, so every tensor of one must be here."""
    trained = {level.site.key: level for level in levels}
    trained |= {f"{path}.{name}": level for level in levels for path, _, name in level.site.ties}
    paths = whole_modules(writing.model, set(trained))
    left = set(trained) - {k for path in paths for k in keys_in(writing.model, path)}
    if left:
        raise cannot(f"PEFT trains whole modules, of the one with '{sorted(left)[0]}' only some tensors are trained")
    writing.saved = paths
    for path in saved_modules(writing.model, paths):  # PEFT takes every module that ends with such a name
        for name, t in writing.model.get_submodule(path).state_dict().items():
            key = f"{path}.{name}"
            writing.tensors[key] = stored(trained[key]) if key in trained else t


def stored(level: Level) -> Tensor:
    return level.method.stored()["value"]


def keys_in(model: nn.Module, path: str) -> list[str]:
    module = model.get_submodule(path)
    return [f"{path}.{name}" for name, _ in module.named_parameters(remove_duplicate=False)]


def whole_modules(model: nn.Module, trained: set[str]) -> list[str]:
    """The outermost modules all of whose parameters are trained."""
    found: list[str] = []
    for path, _ in modules(model):
        keys = keys_in(model, path)
        if keys and trained.issuperset(keys) and not any(inside(path, outer) for outer in found):
            found.append(path)
    return found


# ---------------------------------------------------------------------- biases
def read_biases(reading: Reading) -> list[Part]:
    """`bias="all"` trains every bias of the base, `"…_only"` those of the adapted modules: BitFit."""
    choice = reading.config.get("bias", "none")
    if choice == "none":
        return []
    if choice != "all" and not choice.endswith("_only"):
        raise CheckpointError(f"{reading.folder}: 'bias' = {choice!r} is unknown")
    whole = saved_modules(reading.model, reading.config.get("modules_to_save") or ())
    wanted = biases(reading.model, reading.adapted, choice, whole)
    sites = {site.key: site for site in reading.finder.sites(BitFit(), [""], reading.dtype)} if wanted else {}
    parts = []
    for path, key in wanted.items():
        if f"{path}.bias" in sites:
            parts.append(Part(BitFit(), sites[f"{path}.bias"], {"value": reading.take(key)}))
        else:
            reading.take(key)  # the same tensor as another one
    for key in [k for k in reading.left if k.endswith(".bias")]:
        owner, _, name = key.replace(".base_layer", "").rpartition(".")
        if owner in reading.finder.modules and name in reading.finder.modules[owner]._buffers:
            del reading.left[key]  # a buffer that happens to have this name (GPT-2's causal mask)
    return parts


def biases(model: nn.Module, adapted: Sequence[str], choice: str, saved: Sequence[str] = ()) -> dict[str, str]:
    """Modules whose bias PEFT trains, with the name it stores it under."""
    found = {}
    for path, module in modules(model):
        if module._parameters.get("bias") is None or any(inside(path, outer) for outer in saved):
            continue
        if path in adapted:
            found[path] = f"{path}.base_layer.bias"
        elif choice == "all":
            found[path] = f"{path}.bias"
    return found


def write_biases(writing: Writing, levels: Sequence[Level], peft_type: str) -> str:
    """The `bias` field for the biases trained beside a method."""
    if not levels:
        return "none"
    trained = {level.site.key: level for level in levels}
    saved = saved_modules(writing.model, writing.saved)
    for choice in ("all", f"{peft_type.lower()}_only"):
        wanted = biases(writing.model, writing.adapted, choice, saved)
        if set(trained) == {f"{path}.bias" for path in wanted}:
            for path, key in wanted.items():
                writing.tensors[key] = stored(trained[f"{path}.bias"])
            return choice
    raise cannot(
        f"PEFT trains all biases of the base or those of the adapted modules, this adapter's BitFit trains "
        f"{len(trained)} others (in_proj_bias and the biases of norms count)"
    )


# ---------------------------------------------------------------------- token embeddings
def read_embeddings(reading: Reading) -> list[Part]:
    """Embeddings and output layers, which PEFT stores when they are adapted or were resized: Full where they differ."""
    parts = []
    sites: dict[str, Site] | None = None
    for key in list(reading.left):
        name = key.replace(".base_layer.", ".")
        owner, _, param = name.rpartition(".")
        module = reading.finder.modules.get(owner)
        base = None if module is None else module._parameters.get(param)
        if base is None or not (isinstance(module, nn.Embedding) or owner.rpartition(".")[2] == "lm_head"):
            continue
        t = reading.take(key)
        if t.shape != base.shape:
            raise CheckpointError(
                f"{reading.folder}: '{name}' has {t.shape[0]} rows, the model's has {base.shape[0]}: the vocabulary "
                f"was resized for training, call model.resize_token_embeddings({t.shape[0]}) first"
            )
        if torch.equal(t, base.detach().cpu().to(t.dtype)):
            continue
        if sites is None:
            sites = {site.key: site for site in reading.finder.sites(Full(), [""], reading.dtype)}
        if name in sites:  # else tied to one that is
            parts.append(Part(Full(), sites[name], {"value": t}))
    return parts


def in_place(level: Level, method: Sequence[Level]) -> bool:
    """Whether a trained copy is one of a token embedding that PEFT can only store in the base's place.

    PEFT wraps a module once: not as `modules_to_save` where it is adapted, and its copies are not tied.
    """
    adapted = any(other.site.path == level.site.path for other in method)
    return isinstance(level.site.module, nn.Embedding) and (adapted or bool(level.site.ties))


def write_embeddings(writing: Writing, levels: Sequence[Level]) -> None:
    """Token embeddings as PEFT's `save_embedding_layers` writes them: under their own names and those tied to them."""
    for level in levels:
        for path in (level.site.path, *(path for path, _, _ in level.site.ties)):
            inner = ".base_layer" if path in writing.adapted else ""
            writing.tensors[f"{path}{inner}.weight"] = stored(level)
