"""One folder per adapter: `adapter.safetensors` and `adapter.json`, self-contained, never a pickle.

The tensors' file carries the whole description in its header, so it is complete by itself; `adapter.json` is the same
description to be read by people and programs. Both are written to a temporary file and renamed, tensors first: after a
kill at any moment either the old or the new adapter loads. Digests of the tensors, of the description and of the
adapted base weights refuse damaged files and other bases.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inlay.core.active import attached, container, unadapted
from inlay.core.adapter import Adapter
from inlay.core.base import base_modules
from inlay.core.building import build_sites, check_name, undone_on_error
from inlay.core.companion import Companion
from inlay.core.container import Made, module_key
from inlay.core.errors import CheckpointError, OptionError
from inlay.core.files import atomic, canonical, sha256, tensor_bytes, tensors_digest, write_text
from inlay.core.head import Head
from inlay.core.hollow import hollow
from inlay.core.hosts import QuantisedHost
from inlay.core.images import first_convolution
from inlay.core.method import Method, Placement, method_from
from inlay.core.quantised import dense, is_quantised
from inlay.core.quantised import shape as quantised_shape
from inlay.core.rows import Rows
from inlay.core.sharded import gathered, whole
from inlay.core.sites import Site, Source
from inlay.core.towers import tower_of
from inlay.core.trunks import trunk_of
from inlay.core.where import site_host

FORMAT = "inlay/1"
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


def save(adapter: Adapter, folder: str | Path, about: dict[str, Any] | None = None, shared: bool = False) -> Path:
    """Write an adapter; returns the folder.

    Where the adapter's tensors are spread over processes (FSDP2), all of them must call this: each gathers, the first
    writes, and none returns before the files are there. Otherwise whoever calls writes.

    Args:
        folder: made if needed; an adapter already there is replaced, other files are left alone.
        about: what was trained, kept as given: task, labels, prompt template, metrics.
        shared: store shared frozen tensors (VeRA's projections) in full rather than as seed and checksum.
    """
    folder = Path(folder)
    if attached(adapter.model).state.merged_names:
        raise CheckpointError("adapters are merged: unmerge first, so that the base can be identified")
    with gathered(attached(adapter.model).adapters[adapter.name]) as first:
        tensors = stored_tensors(adapter)
        given = attached(adapter.model).state.given
        frozen = {name: t.cpu() for name, t in shared_tensors(adapter).items() if shared or name in given}
        everything = tensors | {f"shared.{name}": t.contiguous() for name, t in frozen.items()}
        made = attached(adapter.model).state.made.get(adapter.name)
        everything |= {} if made is None else {f"base.{name}": t for name, t in made.tensors.items()}
        document = describe(adapter, about or {}) | {"tensors": tensors_digest(everything)}
        document["checksum"] = sha256(canonical(document))
        if first:
            with atomic(folder / TENSORS) as temporary:
                save_file(everything, temporary, metadata={"inlay": canonical(document)})
            write_text(folder / DESCRIPTION, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return folder


def stored_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors by their names in files: `<site>.<parameter>`."""
    own = attached(adapter.model).adapters[adapter.name]
    return {
        f"{slot.replace('/', '.')}.{name}": t.detach().cpu().contiguous().clone()
        for slot, method in own.named_children()
        if isinstance(method, Method)
        for name, t in method.stored().items()
    }


def shared_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The frozen tensors that this adapter's sites share, by name."""
    used = {name for level in adapter.levels for name in level.site.uses}
    return {name: t for name, t in attached(adapter.model).tensors.named_buffers() if name in used}


def identity(name: str, t: Tensor, derived: set[str]) -> str | list[float]:
    """What tells a shared tensor from others: its digest, or a print of one derived from the base's weights.

    The print is 8 random projections of a random mixture of its columns: columns that are turned or swapped change it.
    """
    if name not in derived:
        return sha256(tensor_bytes(t))
    generator = torch.Generator("cpu").manual_seed(0)
    left, right = (torch.randn(d, n, generator=generator, dtype=torch.float64)
                   for d, n in ((8, t.shape[0]), (t.shape[1], 1)))  # fmt: skip
    return [float(f"{x:.6g}") for x in (left @ (t.detach().cpu().double() @ right)).flatten().tolist()]


def identical(known: str | list[float], name: str, t: Tensor, derived: set[str]) -> bool:
    """Whether a shared tensor is the one a file knows, a derived one up to what rounding does to singular vectors."""
    found = identity(name, t, derived)
    if isinstance(known, str) or isinstance(found, str):
        return known == found
    a, b = torch.tensor(known), torch.tensor(found)
    return bool((a - b).norm() <= 1e-2 * a.norm())


def describe(adapter: Adapter, about: dict[str, Any]) -> dict[str, Any]:
    """Everything but the tensors: methods, places, base, library, task."""
    import inlay as library

    inlay = attached(adapter.model)
    own = inlay.adapters[adapter.name]
    slots = {id(method): slot for slot, method in own.named_children()}
    sites: list[dict[str, Any]] = []
    groups: dict[tuple[int, ...], int] = {}
    for level in adapter.levels:
        group = groups.setdefault(tuple(map(id, level.site.peers)), len(groups))
        sites.append(describe_site(level.site) | {"slot": slots[id(level.method)].replace("/", "."), "group": group,
                                                  "method": level.method.specification(),
                                                  "head": isinstance(level.method, Head)})  # fmt: skip
    model, made = adapter.model, inlay.state.made.get(adapter.name)
    with unadapted(model):
        base = fingerprint([level.site for level in adapter.levels if not isinstance(level.method, Head)])
    return {
        "format": FORMAT,
        "library": library.__version__,
        "name": adapter.name,
        "methods": [p.method.specification() for p in adapter.placements if not isinstance(p.method, Companion)],
        "where": [w if isinstance(w, str) else f"type:{w.__name__}" for w in adapter.where],
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "seed": adapter.seed,
        "head": list(adapter.head),
        "sites": sites,
        "shared": {name: identity(name, t, inlay.state.derived) for name, t in shared_tensors(adapter).items()},
        "base": {
            "architecture": type(model).__name__,
            "name": getattr(getattr(model, "config", None), "_name_or_path", ""),
            "fingerprint": base,
            "quantised": any(level.site.packed for level in adapter.levels),
            **({} if made is None else {"loftq": made.about}),
        },
        "parameters": {"adapter": adapter.adapter_parameters, "head": adapter.head_parameters},
        "about": about,
    }


def describe_site(site: Site) -> dict[str, Any]:
    return {
        "path": site.path, "name": site.name, "depth": site.depth, "param": site.param, "key": site.key,
        "rows": plain_rows(site.rows),
        "expert": site.expert, "entry": site.entry, "width": site.width,
        "ties": [[path, name] for path, _, name in site.ties],
        "shape": stored_shape(site.module, site.param),
        "tower": None if site.tower is None else site.tower.label, "parts": site.parts,
        "pixels": site.pixels, "trunk": None if site.trunk is None else site.trunk.label,
        "hears": {name: [source.path, plain_rows(source.rows)] for name, source in site.hears.items()},
    }  # fmt: skip


def plain_rows(rows: Rows | None) -> list[int | None] | None:
    return None if rows is None else [rows.offset, rows.length, rows.groups, rows.group]


def stored_shape(module: nn.Module, param: str) -> list[int] | None:
    """The shape of a tensor in the base; that of W for a quantised layer, whatever it stores."""
    if param == "weight" and is_quantised(module):
        return list(quantised_shape(module))
    p = module._parameters.get(param)
    return None if p is None else list(p.shape)


def fingerprint(sites: list[Site]) -> str:
    """A digest of the adapted base tensors' content: up to 4,096 numbers of each, rounded to bfloat16.

    Rounding makes a base loaded in float32 or bfloat16 the same base. A tensor without storage has none ("").
    """
    h = hashlib.sha256()
    for site in sorted(sites, key=lambda s: s.key):
        for path, name, p in identifying(site):
            if hollow(p) or not p.is_floating_point():
                return ""
            flat = whole(p.detach()).flatten()
            sample = flat[:: max(1, flat.numel() // 4096)][:4096].float().to(torch.bfloat16)
            h.update(canonical([path, name, list(p.shape)]).encode())
            h.update(tensor_bytes(sample))
    return h.hexdigest()


def identifying(site: Site) -> Iterator[tuple[str, str, Tensor]]:
    """(path, name, tensor) of what a site adapts: its tensor, a tower's embeddings and attentions, a trunk's blocks."""
    p = site.module._parameters.get(site.param)
    if site.packed:
        yield site.path, site.param, site.weight if isinstance(site.host, QuantisedHost) else dense(site.module)
    elif p is not None:
        yield site.path, site.param, p
    elif site.tower is not None:
        yield from held_weight(site.tower.embed, site.tower.embedding)
        if site.tower.track is not None and not site.tower.spots:
            yield from held_weight(site.tower.embed, site.tower.track.patch)
        for spot in site.tower.spots:
            yield from ((spot.path, name, p) for name, p in spot.module.named_parameters())
    elif site.pixels is not None:
        yield from held_weight(site.path, first_convolution(site.module))
    elif site.trunk is not None:
        for path, block in zip(site.trunk.blocks, site.trunk.stack, strict=True):
            yield from ((path, name, p) for name, p in block.named_parameters())


def held_weight(path: str, module: nn.Module | None) -> Iterator[tuple[str, str, Tensor]]:
    """A module's own weight, not the copy that another method may train."""
    p = None if module is None else module._parameters["weight"]
    if p is not None:
        yield path, "weight", p


# ---------------------------------------------------------------------- reading
def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(description, tensors) of a saved adapter, checked against its own digests."""
    folder = Path(folder)
    path = folder / TENSORS
    if not path.exists():
        raise CheckpointError(f"{folder} holds no {TENSORS}" + ("" if folder.is_dir() else " (no such folder)"))
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("inlay")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    if header is None:
        raise CheckpointError(f"{path} was not written by inlay (no description in its header)")
    document = parsed(header, path)
    if document.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {document.get('format')!r}, this version reads {FORMAT!r}")
    check_description(document, path)
    if tensors_digest(tensors) != document["tensors"]:
        raise CheckpointError(f"{path}: the tensors do not match their digest, the file was changed after saving")
    readable = folder / DESCRIPTION
    if readable.exists():
        beside = parsed(readable.read_text(encoding="utf-8", errors="replace"), readable)
        # a valid description of other tensors is what a kill between the two renames leaves: the header is newer
        check_description(beside, readable)
    return document, tensors


def parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} does not describe an adapter")
    return document


def check_description(document: dict[str, Any], path: Path) -> None:
    rest = {k: v for k, v in document.items() if k != "checksum"}
    if document.get("checksum") != sha256(canonical(rest)):
        raise CheckpointError(f"{path} was changed after saving: its checksum does not match")


def load(model: nn.Module, folder: str | Path, name: str | None = None, any_base: bool = False) -> Adapter:
    """Attach a saved adapter, of inlay or of Hugging Face PEFT (`inlay.interop.peft`).

    Args:
        model: the base it was trained on (any dtype, any task class that has the adapted modules).
        name: another name than the saved one.
        any_base: skip the check that the adapted weights are those it was trained on (PEFT folders cannot tell).

    Raises:
        CheckpointError: damaged files, another base, other shapes, missing or extra tensors.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists() and not (folder / TENSORS).exists():
        from inlay.interop import peft

        return peft.read(model, folder, name)
    document, tensors = read(folder)
    name = name or str(document["name"])
    check_name(model._modules.get("inlay"), name)
    modules = base_modules(model)
    sites = [site_from(model, modules, record, folder) for record in document["sites"]]
    methods = [method_in(r, folder) for r in document["sites"]]
    with unadapted(model):
        own = [site for site, r in zip(sites, document["sites"], strict=True) if not r["head"]]
        check_base(document, own, folder, any_base)
    dtype = getattr(torch, document["dtype"])
    groups: dict[int, list[Site]] = {}
    for site, record in zip(sites, document["sites"], strict=True):
        site.dtype, site.peers = dtype, groups.setdefault(record["group"], [])
        site.peers.append(site)
    with undone_on_error(model, name):
        inlay = container(model)
        made = {key.removeprefix("base."): tensors.pop(key) for key in list(tensors) if key.startswith("base.")}
        if "loftq" in document["base"]:
            inlay.state.made[name] = Made(document["base"]["loftq"], made)
        for key, t in tensors.items():
            if key.startswith("shared."):
                inlay.give(key.removeprefix("shared."), t)
        build_sites(model, inlay, name, list(zip(methods, sites, strict=True)), document["seed"])
        adapter = Adapter(
            model, name, [Placement(method_from(m)) for m in document["methods"]], tuple(document["head"]), dtype,
            document["where"], {}, document["seed"],
        )  # fmt: skip
        restore(adapter, document, tensors, folder)
    return adapter


def method_in(record: dict[str, Any], folder: Path) -> Method:
    """The method of one site; CheckpointError where this version has no such method or option."""
    try:
        return Head() if record["head"] else method_from(record["method"])
    except OptionError as error:
        raise CheckpointError(f"{folder} needs what this version of inlay does not have: {error}") from error


def check_base(document: dict[str, Any], sites: list[Site], folder: Path, any_base: bool) -> None:
    """CheckpointError where the adapted weights are not those of training; a quantised base has numbers of its own."""
    base = document["base"]
    found, quantised = fingerprint(sites), any(site.packed for site in sites)
    same_kind = base["fingerprint"] and found and base["quantised"] == quantised
    if "loftq" in base and not any_base and (not quantised or (same_kind and base["fingerprint"] != found)):
        raise CheckpointError(
            f"{folder} stands on a base that LoftQ quantised for it: open the base in full, call "
            "inlay.loftq_base(model, folder), then load"
        )
    if same_kind and base["fingerprint"] != found and not any_base:
        raise CheckpointError(
            f"{folder} was trained on another base ({base['architecture']} '{base['name']}'): the adapted weights "
            "differ. Open that base, or pass any_base=True"
        )


def restore(adapter: Adapter, document: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """Put tensors into built methods; every key and shape must fit."""
    inlay = attached(adapter.model)
    own = inlay.adapters[adapter.name]
    left = dict(tensors)
    for name, buffer in inlay.tensors.named_buffers():
        if f"shared.{name}" in left:
            if not torch.equal(left.pop(f"shared.{name}"), buffer.cpu()):
                raise CheckpointError(
                    f"{folder} brings its own '{name}', but an attached adapter uses another of that name: "
                    "delete that adapter first"
                )
        elif name in document["shared"] and not identical(document["shared"][name], name, buffer, inlay.state.derived):
            made = "computed from the base" if name in inlay.state.derived else "drawn from its seed"
            why = "the base in another precision" if name in inlay.state.derived else "another torch version"
            raise CheckpointError(
                f"{folder}: the shared tensor '{name}' {made} differs from the one trained with ({why}?): "
                "save the adapter with shared=True where it was trained"
            )
    for record in document["sites"]:
        method = own.get_submodule(module_key(record["slot"]))
        assert isinstance(method, Method)
        wanted = {n: t.shape for n, t in method.stored().items()}
        given = {}
        for n, shape in wanted.items():
            key = f"{record['slot']}.{n}"
            if key not in left:
                raise CheckpointError(f"{folder} lacks the tensor '{key}'")
            given[n] = left.pop(key)
            if given[n].shape != shape:
                raise CheckpointError(f"{folder}: '{key}' is {tuple(given[n].shape)}, the model needs {tuple(shape)}")
        method.restore(given)
    extra = [key for key in left if not key.startswith("shared.")]
    if extra:
        raise CheckpointError(f"{folder} has tensors the model has no place for: {', '.join(sorted(extra)[:5])}")


def site_from(model: nn.Module, modules: dict[str, nn.Module], record: dict[str, Any], folder: Path) -> Site:
    """The site a record names in this model, whose modules these are; its module and shape must be there."""
    path = record["path"]
    if path not in modules:
        raise CheckpointError(f"{folder} adapts '{path}', which this {type(model).__name__} does not have: wrong base?")
    module = modules[path]
    found = stored_shape(module, record["param"])
    if record["shape"] is not None and found != record["shape"]:
        raise CheckpointError(f"{folder}: '{path}.{record['param']}' was {record['shape']}, here it is {found}")
    rows = None if record["rows"] is None else Rows(*record["rows"])
    hears = record.get("hears", {})  # which files of before have not
    absent = [source for source, _ in hears.values() if source not in modules]
    if absent:
        raise CheckpointError(f"{folder} hears '{absent[0]}', which this {type(model).__name__} does not have")
    ties = [(tied, modules[tied], name) for tied, name in record["ties"] if tied in modules]
    host = site_host(model, path, record["param"])
    return Site(
        path, module, record["name"], record["depth"], host, record["param"], rows, record["expert"],
        record["entry"], record["width"], key=record["key"], ties=ties,
        tower=None if record["tower"] is None else tower_of(model, record["tower"], path), parts=record["parts"],
        pixels=tuple(record["pixels"]) if record.get("pixels") else None,
        trunk=None if record.get("trunk") is None else trunk_of(model, record["trunk"]),
        hears={n: Source(at, modules[at], None if r is None else Rows(*r)) for n, (at, r) in hears.items()},
    )  # fmt: skip
