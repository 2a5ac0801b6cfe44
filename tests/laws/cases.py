"""Which methods meet which benches: everything in the registry, in several settings, and methods made of methods."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

import inlay
from inlay.core.adapter import Adapter
from inlay.core.companion import Companion
from inlay.core.contexts import ContextMethod
from inlay.core.method import (
    REGISTRY,
    AttentionMethod,
    HiddenMethod,
    Method,
    ParameterMethod,
    PixelMethod,
    TokenMethod,
    WeightMethod,
    method_class,
    method_from,
)
from inlay.core.trunks import SideMethod
from inlay.methods import LoRA
from laws.benches import Bench, benches

PROMPT = "words=[5, 7], closing=[9, 31]"
"""The class prompts of the bench that has some."""

SETTINGS: dict[str, list[str]] = {
    "lora": ["lora(r=3, alpha=6)", "lora(r=2, rank_stabilized=true, init='gaussian', bias=true)"],
    "lorafa": ["lorafa(r=3, alpha=6)", "lorafa(r=2, corrected=true)"],
    "loha": ["loha(r=2, alpha=3)", "loha(r=2, tucker=true, row_dropout=0.3)"],
    "lokr": [
        "lokr(r=1, alpha=2)",
        "lokr(r=1, factor=2, decompose_both=true, tucker=true, init='lycoris', module_dropout=0.01)",
    ],
    "krona": ["krona(scale=2)"],
    "pissa": ["pissa(r=2, alpha=3)"],
    "loraxs": ["loraxs(r=2, deviation=0)", "loraxs(r=3, deviation=0.01)"],
    "eva": ["eva(r=2, alpha=3)", "eva(r=3, rank=1)"],
    "corda": ["corda(r=2, alpha=3)", "corda(r=2, mode='knowledge')"],
    "lorasb": ["lorasb(r=2)"],
    "nola": ["nola(r=2, bases=5)"],
    "vblora": ["vblora(r=2, vectors=6, bound=0.3)", "vblora(r=2, vectors=5, top=3, bound=0.3, compact=true)"],
    "svft": [
        "svft",
        "svft(structure='banded', band=1)",
        "svft(structure='random', init='gated')",
        "svft(structure='top', band=1)",
    ],
    "diablo": ["diablo(blocks=3)"],
    "kradapter": ["kradapter"],
    "kronab": ["kronab(scale=2)"],
    "vera": ["vera(r=5, d_initial=0.5)"],
    "dora": ["dora(of=lora(r=2))", "dora(of=vera(r=5, d_initial=0.5))", "dora(of=lora(r=2, bias=true))"],
    "dylora": ["dylora(of=lora(r=4))", "dylora(of=lora(r=4, bias=true), rank=2)", "dylora(of=vera(r=5), frozen=true)"],
    "deltalora": ["deltalora(of=lora(r=2))"],
    "relora": ["relora(of=lora(r=2), restarts=2)", "relora(of=vera(r=5), restarts=1)"],
    "adalora": ["adalora(r=4, target=2)"],
    "longlora": ["longlora(r=2, alpha=1, groups=2)", "longlora(stretch=2, r=2, alpha=1, groups=3, leak=true)"],
    "ssf": ["ssf", "ssf(init='paper')"],
    "sct": ["sct(channels=3)"],
    "residualseries": ["residualseries(pointwise=true)"],
    "residualparallel": ["residualparallel(pointwise=true)"],
    "weightnorm": ["weightnorm", "weightnorm(trained='g')", "weightnorm(trained='v')"],
    "oft": [
        "oft(block_size=4)",
        "oft(block_size=2, shared=true, neumann=5)",
        "oft(block_size=3, constrained=true, epsilon=0.5)",
        "oft(block_size=4, dropout=0.5)",
    ],
    "boft": ["boft(block_size=2)", "boft(block_size=3, factors=1, scale=false)", "boft(block_size=2, dropout=0.5)"],
    "road": ["road", "road(variant=2)", "road(variant=4)"],
    "ether": ["ether", "ether(blocks=2, side='output')"],
    "etherplus": ["etherplus", "etherplus(blocks=2, side='input')"],
    "galore": ["galore(r=2, every=2)"],
    "glora": ["glora(r=2)", "glora(A='vector', B='constant', C='vector', D='constant', E='none')"],
    "peqa": ["peqa"],
    "sdt": ["sdt(freeze_channels=0.9, freeze_states=0.5, r=0)"],
    "stateoffset": ["stateoffset", "stateoffset(offset='y')", "stateoffset(r=2)"],
    "bitfit": ["bitfit", "bitfit(norms=false)"],
    "normtuning": ["normtuning", "normtuning(statistics='adapted')"],
    "houlsby": ["houlsby(r=3, init='near')"],
    "adaptformer": ["adaptformer(r=3)"],
    "llmseries": ["llmseries(r=3)"],
    "llmparallel": ["llmparallel(r=3)"],
    "compacter": ["compacter(r=2, n=2, rank=2)"],
    "pfeiffer": ["pfeiffer(r=3)"],
    "paralleladapter": ["paralleladapter(r=3)"],
    "linadapter": ["linadapter(r=3)"],
    "loreft": ["loreft(r=2, positions='f2+l1')", "loreft(r=2, init='paper', positions='all')"],
    "direft": ["direft(r=2, positions='f2+l1')"],
    "coop": [
        f"coop(tokens=2, init='words', {PROMPT})",
        f"coop(tokens=3, position='middle', {PROMPT}, scale=0.5)",
        f"coop(tokens=3, position='front', classes=5, {PROMPT}, scale=0.5)",
    ],
    "cocoop": [
        f"cocoop(tokens=2, init='words', {PROMPT}, reduction=3)",
        "cocoop(tokens=3, scale=0.5, reduction=2, chunk=7)",
    ],
    "maple": [f"maple(tokens=2, init='words', scale=0.3, {PROMPT})", "maple(tokens=3, depth=1, scale=0.5)"],
    "visualprompt": ["visualprompt(size=2)", "visualprompt(shape='random', size=3, init='normal')"],
    "vpt": ["vpt(tokens=3)", "vpt(tokens=2, deep=false, width=6)"],
    "pgn": ["pgn(tokens=2, library=5, side=16)"],
    "noreft": ["noreft(r=2, positions='f2+l1')"],
    "consreft": ["consreft(r=2, positions='f2+l1')"],
    "lobireft": ["lobireft(r=2, positions='f2+l1')"],
    "prompttuning": ["prompttuning(tokens=3)"],
    "ptuning": ["ptuning(tokens=3, hidden=3)", "ptuning(tokens=2, encoder='mlp', hidden=6)"],
    "ptuningv2": ["ptuningv2(tokens=3)", "ptuningv2(tokens=2, reparameterize=true, hidden=6)"],
    "dept": ["dept(tokens=2, r=3, length=9)"],
    "llamaadapter": ["llamaadapter(tokens=3)", "llamaadapter(tokens=2, layers=1, gate='plain')"],
    "sidetuning": [
        "sidetuning(r=8, heads=2, depth=1)",
        "sidetuning(r=6, heads=3, blend='linear', alpha=0.6, end=0.5)",
        "sidetuning(r=4, heads=1, blend='fixed', alpha=0.3)",
    ],
    "unipt": ["unipt(factor=2)", "unipt(factor=4, residual=false)"],
    "prefixtuning": ["prefixtuning(tokens=3)", "prefixtuning(tokens=2, reparameterize=true, hidden=6)"],
}
"""Small settings by method; a method that is not listed runs with its defaults."""


@cache
def methods() -> tuple[Method, ...]:
    """Every registered method in each of its settings."""
    method_class("lora")  # registers all
    return tuple(method_from(text) for name in REGISTRY for text in SETTINGS.get(name, [name]))


def places(method: Method, bench: Bench) -> tuple[str, ...] | None:
    """Where a method of that family goes on a bench, empty for its own places; None where the bench has none."""
    if method.needs and not bench.grids:
        return None
    if isinstance(method, ContextMethod):
        return () if bench.prompts else None
    if bench.only and method.name() not in bench.only:
        return None
    if method.architecture and not bench.only and bench.name != "llama":  # one that it must refuse will do
        return None
    if isinstance(method, ParameterMethod):
        return bench.tensors or None
    if isinstance(method, WeightMethod):
        return bench.where or None
    if isinstance(method, PixelMethod):
        return () if bench.name == "vit" else None
    if isinstance(method, SideMethod):
        return () if bench.tokens or bench.name == "timm" else None
    if method.answers:
        return None  # nothing is trained: tests/papers/test_fitted.py
    if isinstance(method, HiddenMethod) and method.has_sites:
        return bench.hidden or None
    if isinstance(method, TokenMethod | AttentionMethod):
        return () if bench.tokens else None
    if isinstance(method, Companion):
        return () if bench.name in ("bert", "classifier") else None
    return () if bench.name == "classifier" else None


@dataclass(frozen=True)
class Case:
    """A method on a bench in a dtype."""

    method: Method
    bench: Bench
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"{self.method.label()} @ {self.bench.name}"

    def model(self) -> nn.Module:
        return model_of(self.bench, self.dtype)

    def feed(self) -> dict:
        return self.bench.feed(self.dtype)

    def attach(self, model: nn.Module, name: str = "default", seed: int = 0) -> Adapter:
        """The method on this bench; trained tensors in float32, or in float64 on a float64 base.

        One that governs others stands beside LoRA.
        """
        where = places(self.method, self.bench) or None
        wide = torch.promote_types(self.dtype, torch.float32)
        methods = [LoRA(r=2), self.method] if isinstance(self.method, Companion) else self.method
        return inlay.adapt(model, methods, where, name=name, dtype=wide, seed=seed)


@cache
def _template(name: str, dtype: torch.dtype) -> nn.Module:
    return benches()[name].model(dtype)


def model_of(bench: Bench, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh copy of a bench's model, always with the same numbers."""
    return copy.deepcopy(_template(bench.name, dtype))


def cases(dtype: torch.dtype = torch.float32) -> list[Case]:
    """Every method on every bench that has a place for it."""
    found = [Case(m, b, dtype) for m in methods() for b in benches().values() if places(m, b) is not None]
    if dtype == torch.float64:  # transformers' models compute parts of themselves in float32
        narrow = {"gpt2-qv", "mamba", "mamba-padded", "nf4"}  # so does bitsandbytes
        found = [c for c in found if not c.bench.tokens and c.bench.name not in narrow and c.method.mergeable]
    return found


@torch.no_grad()
def stir(adapter: Adapter | nn.Module, seed: int = 1, by: float = 0.2) -> None:
    """Move every trained tensor away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.add_(by * noise * (1 + p.abs().mean()))
