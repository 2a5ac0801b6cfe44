"""Adapters of Hugging Face PEFT: folders with `adapter_config.json` and `adapter_model.safetensors`.

What a folder describes is rebuilt from inlay's own methods and computes the same; what they cannot express is refused,
naming the field and the reason. `support()` lists both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.core.active import attached, container
from inlay.core.adapter import Adapter, model_is
from inlay.core.building import build_sites, check_name, find_head, undone_on_error
from inlay.core.errors import CheckpointError, OptionError, near
from inlay.core.head import Head
from inlay.core.levels import Level
from inlay.core.method import Method, Placement
from inlay.core.where import inside
from inlay.interop import saved
from inlay.interop.adalora import AdaloraFamily
from inlay.interop.adaption import AdaptionFamily
from inlay.interop.beft import BeftFamily
from inlay.interop.family import Family, Part, Reading, Writing, cannot
from inlay.interop.fields import check
from inlay.interop.folder import CONFIG, open_folder, save_folder
from inlay.interop.glora import GloraFamily
from inlay.interop.ia3 import IA3Family
from inlay.interop.lora import LoraFamily
from inlay.interop.lycoris import LohaFamily, LokrFamily
from inlay.interop.matching import TASK_HEADS, saved_modules, task_of
from inlay.interop.norms import NormFamily
from inlay.interop.prompts import KEY, EncodedFamily, PrefixFamily, PromptFamily
from inlay.interop.road import RoadFamily
from inlay.interop.rotations import BoftFamily, OftFamily
from inlay.interop.vblora import BANK, VbloraFamily
from inlay.interop.vera import VeraFamily
from inlay.methods.weight.bitfit import BitFit
from inlay.methods.weight.full import Full

FAMILIES: dict[str, Family] = {
    family.peft_type: family
    for family in (
        AdaloraFamily(), VbloraFamily(), VeraFamily(), LoraFamily(), LohaFamily(), LokrFamily(), OftFamily(),
        BoftFamily(), RoadFamily(), GloraFamily(), IA3Family(), NormFamily(), BeftFamily(), PromptFamily(),
        EncodedFamily(), PrefixFamily(), AdaptionFamily(),
    )
}  # fmt: skip
"""The PEFT methods that are read and written, by `peft_type`; the first that takes all of an adapter writes it."""

WRITTEN_FOR = "0.21.2"
"""The version of PEFT whose folders these are."""


def read(model: nn.Module, folder: str | Path, name: str | None = None) -> Adapter:
    """Attach the adapter of a PEFT folder; trained tensors are float32 (float64 where the folder has that).

    Args:
        model: the base it was trained on, not wrapped by PEFT. A PEFT folder holds no fingerprint of its base, so only
            names and shapes are checked.
        name: the adapter's name in the model, "default" if omitted.

    Raises:
        CheckpointError: a damaged or incomplete folder, a pickle, or a field that inlay cannot express (it is named).
        SiteError: the configuration names no module of this model, or one that inlay cannot adapt.
    """
    model_is(model)
    folder = Path(folder)
    document, tensors = open_folder(folder)
    family = family_of(document, folder)
    config = check(document, family.fields, folder / CONFIG)
    left = {bare(key, family.prefix): t for key, t in tensors.items()}
    wide = any(t.dtype == torch.float64 for t in left.values())
    reading = Reading(model, folder, config, left, torch.float64 if wide else torch.float32)
    try:
        parts = saved.read_modules(reading)
        parts = [*family.read(reading), *parts]
        parts += [*saved.read_biases(reading), *saved.read_embeddings(reading)]
    except OptionError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    except re.error as error:
        raise CheckpointError(f"{folder / CONFIG}: {error.pattern!r} is no regular expression: {error}") from error
    if reading.left:
        raise CheckpointError(
            f"{folder} has {len(reading.left)} tensors that its configuration does not account for in this "
            f"{type(model).__name__}: {', '.join(sorted(reading.left)[:3])}"
        )
    return attach(reading, parts, name or "default")


def bare(key: str, prefix: str) -> str:
    """A tensor's name without what PEFT puts before the base's names."""
    return key.removeprefix(prefix if key.startswith(prefix) else "base_model.")


def family_of(document: dict[str, Any], folder: Path) -> Family:
    """The family of a configuration's `peft_type`."""
    if "peft_type" not in document:
        raise CheckpointError(f"{folder / CONFIG} lacks the field 'peft_type': the folder is incomplete")
    kind = str(document["peft_type"])
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{folder}: peft_type '{kind}' cannot be read{near(kind, FAMILIES)} (known: {', '.join(sorted(FAMILIES))})"
        )
    return FAMILIES[kind]


def attach(reading: Reading, parts: Sequence[Part], name: str) -> Adapter:
    """Build the parts and put their tensors in; the model is untouched when that fails."""
    model = reading.model
    check_name(model._modules.get("inlay"), name)
    with undone_on_error(model, name):
        inlay = container(model)
        for shared, t in reading.shared.items():
            inlay.give(shared, t)
        build_sites(model, inlay, name, [(part.method, part.site) for part in parts], seed=0)
        heads = tuple(h for h in find_head(reading.finder) if any(heads_at(part, h) for part in parts))
        where = sorted({part.site.path for part in parts if not isinstance(part.method, Head | BitFit)})
        placements = [Placement(method) for method in representative(parts)]
        adapter = Adapter(model, name, placements, heads, reading.dtype, list(where), {}, 0)
        for part, method in zip(parts, inlay.adapters[name].children(), strict=True):
            assert isinstance(method, Method)
            fill(method, part, reading.folder)
    return adapter


def fill(method: Method, part: Part, folder: Path) -> None:
    """Put a part's tensors into its built method; names and shapes must fit."""
    wanted = {name: t.shape for name, t in method.stored().items()}
    for name, shape in wanted.items():
        given = part.tensors.get(name)
        if given is None:
            raise CheckpointError(f"{folder} lacks the tensor '{name}' of {method.label()} at '{part.site.key}'")
        if given.shape != shape:
            raise CheckpointError(
                f"{folder}: at '{part.site.key}' the tensor '{name}' of {method.label()} is {tuple(given.shape)}, this "
                f"model needs {tuple(shape)}: wrong base?"
            )
    method.restore(part.tensors)


def heads_at(part: Part, head: str) -> bool:
    return isinstance(part.method, Head) and inside(part.site.path, head)


def representative(parts: Sequence[Part]) -> list[Method]:
    """For each kind of method the options most sites have."""
    kinds: dict[type[Method], list[Method]] = {}
    for part in parts:
        if not isinstance(part.method, Head):
            kinds.setdefault(type(part.method), []).append(part.method)
    most = {kind: Counter(m.label() for m in methods).most_common(1)[0][0] for kind, methods in kinds.items()}
    return [next(m for m in methods if m.label() == most[kind]) for kind, methods in kinds.items()]


# ---------------------------------------------------------------------- writing
@torch.no_grad()
def write(adapter: Adapter, folder: str | Path) -> Path:
    """Write an adapter as a PEFT folder; returns it. Files of that name are replaced, others are left alone.

    Raises:
        CheckpointError: PEFT cannot express the adapter; the sentence says what and why.  AdapterError: it is merged.
    """
    folder = Path(folder)
    if attached(adapter.model).state.merged:
        raise cannot("adapters are merged into this model: unmerge first")
    if adapter.name in attached(adapter.model).state.made:
        raise cannot("its base was quantised for it by LoftQ, which PEFT does not note and would load on another one")
    levels = adapter.levels
    biases = [level for level in levels if isinstance(level.method, BitFit)]
    copies = [level for level in levels if isinstance(level.method, Head | Full)]
    method = [level for level in levels if level not in biases and level not in copies]
    if not method:  # biases are the method, not beside one
        method, biases = biases, []
    family = family_for(method, levels)
    writing = Writing(adapter)
    embeddings = [level for level in copies if saved.in_place(level, method)]
    saved.write_modules(writing, [level for level in copies if level not in embeddings])
    family.write(writing, method)
    saved.write_embeddings(writing, embeddings)
    bias = saved.write_biases(writing, biases, family.peft_type)
    known = {field.name for field in family.fields}
    if writing.saved and "modules_to_save" not in known:
        raise cannot(f"PEFT's {family.peft_type} saves no trained modules beside it ({writing.saved[0]}): head=None")
    if bias != "none" and "bias" not in known:
        raise cannot(f"PEFT's {family.peft_type} trains no biases beside it")
    if "bias" in known:
        writing.config["bias"] = bias
    config = {name: value for name, value in describe(writing, family).items() if name in known} | writing.config
    save_folder(folder, config, {BARE.get(key, family.prefix + key): t for key, t in writing.tensors.items()})
    return folder


BARE = {name: f"base_model.{name}" for name in ("vera_A", "vera_B", BANK)} | {KEY: KEY}
"""Tensors that belong to no module of the base."""


def family_for(method: Sequence[Level], levels: Sequence[Level]) -> Family:
    """The one PEFT method that an adapter is."""
    if not method:
        names = sorted({type(level.method).__name__ for level in levels})
        raise cannot(f"PEFT has no method for {' and '.join(names)} alone")
    for family in FAMILIES.values():
        if all(family.takes(level.method) for level in method):
            return family
    found = {next((f.peft_type for f in FAMILIES.values() if f.takes(lv.method)), lv.method.label()) for lv in method}
    unknown = sorted(found - set(FAMILIES))
    if unknown:
        raise cannot(f"PEFT has no counterpart of {unknown[0]}")
    raise cannot(f"PEFT saves one method per folder, this adapter is made of {' and '.join(sorted(found))}")


def describe(writing: Writing, family: Family) -> dict[str, Any]:
    """The fields that all PEFT configurations have."""
    model = writing.model
    task = task_of(model)
    held = saved_modules(model, writing.saved)
    if not set(saved_modules(model, TASK_HEADS.get(task or "", ()))) <= set(held):
        task = None  # PEFT would expect the head in the folder
    origin = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "peft_type": family.peft_type,
        "peft_version": WRITTEN_FOR,
        "task_type": task,
        "auto_mapping": None if task else origin,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        "revision": None,
        "inference_mode": True,
        "modules_to_save": writing.saved or None,
    }


# ---------------------------------------------------------------------- the support table
def support() -> list[dict[str, str]]:
    """What is read, written and refused: one row per PEFT method (field "") and one per field of its configuration."""
    rows = [
        {"peft_type": "any other", "field": "", "use": "refused", "note": "no method of inlay corresponds to it yet"}
    ]
    for kind, family in sorted(FAMILIES.items()):
        rows.append({"peft_type": kind, "field": "", "use": "read and written", "note": family.note})
        rows += [{"peft_type": kind, "field": f.name, "use": f.use, "note": f.why} for f in family.fields]
    return rows
