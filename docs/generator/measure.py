"""What a method can do at a type of site, found out by doing it."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.catalogue import names
from inlay.core.adapter import Adapter
from inlay.core.errors import InlayError, OptionError
from inlay.core.method import REGISTRY, AttentionMethod, Method, PixelMethod, TokenMethod, method_class, method_from
from inlay.core.options import Option, options
from inlay.interop import peft

from .places import PLACES, ROWS, Inputs, Place

CLOSE = 1e-5
"""Largest accepted difference between two ways to compute one output, relative to the largest number in it."""


@dataclass
class Cell:
    """One method at one type of site: what works, and for what does not, why."""

    works: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    peft: str = ""
    """The type of the PEFT folder it is written as; empty where it is not."""


def specifications() -> list[str]:
    """Every registered method with its defaults, then each made of the other methods it takes."""
    method_class("lora")  # registers all
    return [text for name in names() for text in (name, *made_of(name))]


def made_of(name: str) -> list[str]:
    """`dora(of=vera)` and the like: the methods an option of a method takes, its default left out."""
    return [
        f"{name}({opt.name}={inner})"
        for opt in options(REGISTRY[name]).values()
        if isinstance(opt.default, Method)
        for inner, cls in sorted(REGISTRY.items())
        if takes(REGISTRY[name], opt, cls) and not isinstance(opt.default, cls)
    ]


def takes(outer: type[Method], o: Option, inner: type[Method]) -> bool:
    """Whether a method can be made of another, as the value of that option."""
    if not issubclass(inner, o.type):
        return False
    try:
        outer(**{o.name: inner()})
    except OptionError:
        return False
    return True


def measured(text: str) -> dict[str, Cell]:
    """The row of a method: a cell for every type of site that is one for its family."""
    method = method_from(text)
    return {place.name: cell_of(text, place) for place in PLACES if concerns(method, place)}


def concerns(method: Method, place: Place) -> bool:
    """Whether asking makes sense: methods on inputs, tokens and attentions know their own places, a head has none.

    A method for one architecture has its places there alone.
    """
    if method.architecture or place.name == "mamba":
        return method.architecture == place.name
    own = isinstance(method, TokenMethod | AttentionMethod | PixelMethod)
    return method.has_sites and own == (place.where is None)


def cell_of(text: str, place: Place) -> Cell:
    """One cell: the same network is adapted, tried, adapted a second time and tried with both."""
    try:
        trial = Trial(text, place)
    except InlayError as error:
        return Cell(refused={"attach": generic(error, text, place)})
    assert relative(trial.base, trial.a) > 1e-6, f"{text} at {place.name}: attached, and it changes nothing"
    cell = Cell(works={"attach"})
    for name, check in CHECKS.items():
        try:
            check(trial)
        except InlayError as error:
            cell.refused[name] = generic(error, text, place)
        else:
            cell.works.add(name)
    cell.peft = trial.peft
    return cell


class Trial:
    """A method attached at a place as adapter `a`, with what base and adapted network give."""

    def __init__(self, text: str, place: Place) -> None:
        self.text, self.place, self.inputs, self.peft = text, place, place.feed(), ""
        self.model = place.model()
        self.base = output(self.model, self.inputs)
        self.adapter = attached(self.model, text, place, "a")
        self.a = output(self.model, self.inputs)

    def same(self, a: Tensor, b: Tensor, what: str) -> None:
        """AssertionError where two outputs differ: a defect of the library, not a refusal."""
        found = relative(a, b)
        assert found <= CLOSE, f"{self.text} at {self.place.name}, {what}: relative difference {found:.1e}"


def attached(model: nn.Module, text: str, place: Place, name: str) -> Adapter:
    """The method on a network, its trained tensors moved from their start as training would."""
    adapter = inlay.adapt(model, text, place.where, name=name)
    generator = torch.Generator().manual_seed(ord(name))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return adapter


@torch.no_grad()
def output(model: nn.Module, inputs: Inputs) -> Tensor:
    out = model(**inputs)
    return (out if isinstance(out, Tensor) else out[0]).clone()


def relative(a: Tensor, b: Tensor) -> float:
    """max |a − b| / max |a|."""
    return float((a - b).abs().max() / a.abs().max())


def generic(error: InlayError, text: str, place: Place) -> str:
    """A refusal as a sentence about any such method and place rather than about these."""
    roots = {*(place.where or ()), *(path for path, _ in place.model().named_modules() if path)}
    sentence = str(error).removeprefix("this adapter cannot be written as a PEFT folder: ")
    sentence = sentence.replace(method_from(text).label(), "*method*")
    sentence = re.sub(r"'([^' ]*)'", lambda m: "*place*" if inside(m[1], roots) else m[0], sentence)
    sentence = re.sub(r"\[\*place\*(, \*place\*)*\]", "*place*", sentence)
    sentence = re.sub(r"\*place\* \(\w+\)", "*place*", sentence)
    return re.sub(r", \*place\* is \w+$", ", which *place* is not", sentence)


def inside(name: str, roots: set[str]) -> bool:
    """Whether a quoted name is one of these, or a part of one."""
    return not name or any(name == root or name.startswith((f"{root}.", f"{root}[")) for root in roots)


# ---------------------------------------------------------------------- capabilities
def merges(t: Trial) -> None:
    """Merged equals adapted; un-merged, the base has its own bits again."""
    t.adapter.merge()
    t.same(t.a, output(t.model, t.inputs), "merged")
    t.adapter.unmerge()
    with inlay.disabled(t.model):
        assert torch.equal(t.base, output(t.model, t.inputs)), f"{t.text} at {t.place.name}: un-merging left a trace"


def peft_folder(t: Trial) -> None:
    """Written as a PEFT folder and read back, it computes the same."""
    with tempfile.TemporaryDirectory() as folder:
        peft.write(t.adapter, Path(folder))
        t.peft = json.loads((Path(folder) / "adapter_config.json").read_text())["peft_type"]
        fresh = t.place.model()
        peft.read(fresh, Path(folder))
    t.same(t.a, output(fresh, t.inputs), "by way of PEFT")


def several(t: Trial) -> None:
    """Two adapters switch and rest without residue."""
    attached(t.model, t.text, t.place, "b")
    b = output(t.model, t.inputs)
    for name, wanted in (("a", t.a), ("b", b)):
        inlay.use(t.model, name)
        assert torch.equal(wanted, output(t.model, t.inputs)), f"{t.text} at {t.place.name}: '{name}' has changed"
    with inlay.disabled(t.model):
        assert torch.equal(t.base, output(t.model, t.inputs)), f"{t.text} at {t.place.name}: a residue when disabled"


def stacks(t: Trial) -> None:
    """Two adapters of this method act at once, the one on top of the other."""
    inlay.use(t.model, "a", "b")
    both = output(t.model, t.inputs)
    inlay.use(t.model, "a")
    assert relative(both, t.a) > 1e-6, f"{t.text} at {t.place.name}: stacked, the second one does nothing"


def routes(t: Trial) -> None:
    """A batch with an adapter per row equals its rows one by one; `several` has attached `b`."""
    names = ["a", None, "b", "a"]
    assert len(names) == ROWS
    with inlay.route(t.model, names):
        routed = output(t.model, t.inputs)
    for i, name in enumerate(names):
        inlay.use(t.model, *([] if name is None else [name]))
        alone = output(t.model, {key: x[i : i + 1] for key, x in t.inputs.items()})
        t.same(alone, routed[i : i + 1], f"row {i} of a routed batch")


CHECKS: dict[str, Callable[[Trial], None]] = {
    "merge": merges, "peft": peft_folder, "several": several, "stack": stacks, "route": routes,
}  # fmt: skip


def compiles(text: str, place_name: str) -> str:
    """Why `torch.compile(fullgraph=True)` fails there; empty if output and gradients are the uncompiled ones."""
    trial = Trial(text, next(place for place in PLACES if place.name == place_name))
    wanted, gradients = graded(trial.model, trial)
    try:
        found, compiled = graded(torch.compile(trial.model, fullgraph=True, backend="eager"), trial)
    except torch._dynamo.exc.TorchDynamoException as error:
        return str(error).strip().splitlines()[0]
    finally:
        torch._dynamo.reset()
    trial.same(wanted, found, "compiled")
    for a, b in zip(gradients, compiled, strict=True):
        trial.same(a, b, "gradients, compiled")
    return ""


def graded(run: Callable[..., Any], trial: Trial) -> tuple[Tensor, list[Tensor]]:
    """(output, gradients of the trained tensors) of one pass."""
    trial.model.zero_grad()
    out = run(**trial.inputs)
    y = out if isinstance(out, Tensor) else out[0]
    y.square().sum().backward()
    return y.detach().clone(), [p.grad.clone() for p in trial.adapter.parameters() if p.grad is not None]
