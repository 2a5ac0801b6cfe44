"""Attaching methods to a model, and the handle one works with afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from inlay.core.active import attached, container, delete
from inlay.core.building import build, check_name, find_head, parts_of, place, undone_on_error
from inlay.core.companion import Companion
from inlay.core.container import Inlay
from inlay.core.errors import AdapterError, OptionError, SiteError
from inlay.core.head import Head
from inlay.core.levels import Level
from inlay.core.method import Method, Placement
from inlay.core.quantised import numbers
from inlay.core.statistics import Calibrated
from inlay.core.where import Finder, Pattern, inside

if TYPE_CHECKING:
    from inlay.core.merge import Merged

HEAD = "head"
Methods = Method | Placement | str | dict | Sequence[Method | Placement | str | dict]


def adapt(
    model: nn.Module,
    methods: Methods,
    where: Pattern | Sequence[Pattern] | None = None,
    *,
    name: str = "default",
    exclude: Sequence[Pattern] = (),
    layers: Iterable[int] | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    head: Literal["auto"] | Sequence[str] | None = "auto",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    image_size: int | tuple[int, int] | None = None,
) -> Adapter:
    """Attach one or several methods as a named adapter; the model stays the model it was.

    Args:
        model: any `nn.Module`. Its tensors are frozen; nothing in it is copied, renamed or replaced.
        methods: a method, a placement (`LoRA().on("attn.q")`), text (`"lora(r=8)"`), or a list of these, lowest first.
        where: neutral names (`attn.q`, `block[3].mlp.up`), module paths or their endings (`query`), globs, `re:…`,
            module types, `"all-linear"`; each method's own default places when omitted.
        name: the adapter's name; several can be attached and switched.
        exclude: patterns to leave out.  layers: block indices to keep.
        overrides: options that differ at some places, `{"block[0]": {"r": 16}}`.
        head: task-head modules trained and saved beside the methods; "auto" finds the classification or
            regression head of a task model, None trains none.
        dtype: type of trained tensors, float32 by default whatever the base holds.
        seed: seed of the initial values; the global random state is left alone.
        image_size: side of the images in pixels, or (height, width), for methods on pixels; by default what the
            model's configuration says.

    Raises:
        SiteError: a pattern matches nothing, or a method cannot act there.  ComposeError: methods that cannot stand
        together.  AdapterError: the name is taken or not usable.
    """
    model_is(model)
    several: Sequence[Any] = methods if isinstance(methods, list | tuple) else [methods]
    placements = [place(m) for m in several]
    patterns = None if where is None else (where,) if isinstance(where, str | type) else tuple(where)
    finder = Finder(model, exclude=tuple(exclude), layers=None if layers is None else tuple(layers))
    heads = find_head(finder) if head == "auto" else tuple(head or ())
    finder = Finder(model, heads, tuple(exclude), None if layers is None else tuple(layers), image_size)
    plans = []
    companions = [p.method for p in placements if isinstance(p.method, Companion)]
    for p in [part for placement in placements for part in parts_of(placement, patterns)]:
        if isinstance(p.method, Companion):
            if p.where:
                raise OptionError(f"{p.method.label()} governs the methods beside it and has no places of its own")
            continue
        if p.method.answers and heads:
            plans.append((p, Finder(model).sites(p.method, at_heads(heads), dtype)))
        elif p.method.has_sites:
            plans.append((p, finder.sites(p.method, p.where or patterns or p.method.where or ("",), dtype)))
        elif not heads:
            raise SiteError(
                f"{p.method.label()} trains the task head alone, but no head was found: name it, head=['…']"
            )
    if heads and not any(p.method.answers for p, _ in plans):
        plans.append((Placement(Head()), Finder(model).sites(Head(), at_heads(heads), dtype)))
    check_name(model._modules.get("inlay"), name)
    with undone_on_error(model, name):
        build(model, container(model), name, plans, overrides or {}, seed, companions)
    return Adapter(model, name, placements, heads, dtype, list(patterns or ()), overrides or {}, seed)


def at_heads(paths: Sequence[str]) -> list[Pattern]:
    """Patterns of exactly these modules."""
    return [f"re:{re.escape(path)}" for path in paths]


def model_is(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise AdapterError(
            "adapt the model before DistributedDataParallel wraps it: only tensors that are there then are kept in step"
        )


class Adapter:
    """Handle of one attached adapter: print it, save it, merge it, switch it."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        placements: list[Placement],
        head: tuple[str, ...],
        dtype: torch.dtype,
        where: list[Pattern],
        overrides: dict[str, dict[str, Any]],
        seed: int,
    ) -> None:
        self.model, self.name, self.placements, self.head = model, name, placements, head
        self.dtype, self.where, self.overrides, self.seed = dtype, where, overrides, seed

    @property
    def levels(self) -> list[Level]:
        """Each built method with its primary site."""
        unique: dict[int, Level] = {}
        for level in attached(self.model).levels(self.name):
            unique.setdefault(id(level.method), level)
        return list(unique.values())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trained tensors, the head's included."""
        yield from attached(self.model).adapters[self.name].parameters()

    @property
    def adapter_parameters(self) -> int:
        """Trained numbers of the methods, without the head."""
        return sum(p.numel() for lv in self.levels if not isinstance(lv.method, Head) for p in lv.method.parameters())

    @property
    def head_parameters(self) -> int:
        """Trained numbers of the task head."""
        return sum(p.numel() for lv in self.levels if isinstance(lv.method, Head) for p in lv.method.parameters())

    @property
    def base_parameters(self) -> int:
        """Numbers in the base model, head included, adapters not."""
        return numbers(m for path, m in self.model.named_modules() if not inside(path, "inlay"))

    def save(self, folder: str, **about: Any) -> None:
        """Write `adapter.safetensors` and `adapter.json` into a folder, atomically; see `inlay.core.checkpoint`."""
        from inlay.core.checkpoint import save

        save(self, folder, about)

    def merge(self, dequantise: bool = False, requantise: bool = False) -> Merged:
        """Fold this adapter into the base's tensors, see `inlay.core.merge`; `unmerge` restores them bit for bit."""
        from inlay.core.merge import merge

        return merge(self.model, self.name, dequantise=dequantise, requantise=requantise)

    def unmerge(self) -> None:
        """Undo `merge`."""
        from inlay.core.merge import unmerge

        unmerge(self.model)

    def delete(self) -> None:
        """Remove this adapter from the model."""
        delete(self.model, self.name)

    def __repr__(self) -> str:
        methods = " + ".join(p.method.label() for p in self.placements)
        inlay = self.model._modules.get("inlay")
        if not isinstance(inlay, Inlay) or self.name not in inlay.adapters:
            return f"adapter '{self.name}': {methods} (no longer attached)"
        trained, head, base = self.adapter_parameters, self.head_parameters, self.base_parameters
        lines = [
            f"adapter '{self.name}': {methods}",
            f"  {trained:,} trained parameters ({100 * trained / max(base, 1):.3f} % of the base), "
            f"{sum(p.nbytes for p in self.parameters()):,} bytes" + (f", and a head of {head:,}" if head else ""),
        ]
        waiting = [m for lv in self.levels for m in lv.method.modules() if isinstance(m, Calibrated)]
        if not all(m.is_calibrated for m in waiting):
            lines.append("  not calibrated: inlay.calibrate(model, batches) lets it start from data")
        for level in self.levels:
            shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in level.method.named_parameters())
            lines.append(f"  {level.site.name or level.site.key:<28} {type(level.method).__name__:<12} {shapes}")
        return "\n".join(lines)
