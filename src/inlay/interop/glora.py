"""PEFT's GLORA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from inlay.core.method import Method
from inlay.core.sites import Site
from inlay.interop.family import Part, Reading, cannot
from inlay.interop.fields import COMMON, SAVED, Field, Names, idle, need, read
from inlay.interop.modules import ModuleFamily, alike
from inlay.methods.weight.glora import GLoRA


class GloraFamily(ModuleFamily[GLoRA]):
    peft_type: ClassVar[str] = "GLORA"
    note: ClassVar[str] = "GLoRA on Linear, where A and B are of one kind, and D and E"
    fields: ClassVar[tuple[Field, ...]] = (
        *COMMON, SAVED, need("target_modules", Names), need("r", int),
        read("config_A_B", str, "lora", "A and B"), read("config_C", str, "lora", "C"),
        read("config_D_E", str, "constant", "D and E"),
        read("bias", str, "none", "'all' and 'glora_only' are BitFit beside GLoRA"),
        idle("init_weights", "the tensors are in the folder"),
    )  # fmt: skip
    kinds: ClassVar[tuple[type[Method], ...]] = (GLoRA,)

    def spec(self, reading: Reading) -> GLoRA:
        weight, coupling, bias = (reading.config[f"config_{name}"] for name in ("A_B", "C", "D_E"))
        return GLoRA(r=reading.config["r"], A=weight, B=weight, C=coupling, D=bias, E=bias)

    def part(self, reading: Reading, spec: GLoRA, path: str, site: Site) -> Part:
        tensors = {}
        for name, kind, _, _ in spec.shapes(site):
            if kind == "lora":
                for end in "du":
                    tensors[f"{name}_{end}"] = reading.take(f"{path}.glora_{name}.X{end}")
            elif kind != "none":
                tensors[f"{name}_x"] = reading.take(f"{path}.glora_{name}.X").view(-1, 1)
        for name in "ABCDE":  # what is absent is stored as zeros
            reading.left.pop(f"{path}.glora_{name}.zeros", None)
        return Part(spec, site, tensors)

    def config(self, methods: Sequence[GLoRA], sites: Sequence[Site]) -> dict[str, Any]:
        r, A, B, C, D, E = alike(methods, "r", "A", "B", "C", "D", "E")
        if A != B or D != E:
            raise cannot(f"PEFT has one kind for A and B and one for D and E, these are {A} and {B}, {D} and {E}")
        return {"r": r, "config_A_B": A, "config_C": C, "config_D_E": D, "init_weights": True}

    def tensors(self, method: GLoRA, site: Site) -> dict[str, Tensor]:
        d_out, d_in = site.shape
        whole = {"A": (d_out, d_in), "B": (d_out, d_in), "C": (d_in, 1), "D": (d_out,), "E": (d_out,)}
        own, kinds, found = dict(method.named_parameters()), method.fields(), dict[str, Tensor]()
        for name, shape in whole.items():
            parts = {end: own[f"{name}_{end}"] for end in "dux" if f"{name}_{end}" in own}
            for end, t in parts.items():
                flat = end == "x" and (name in "DE" or kinds[name] == "constant")
                found[f"glora_{name}.X{end.strip('x')}"] = t.flatten() if flat else t
            if not parts:
                found[f"glora_{name}.zeros"] = torch.zeros(shape)
        return found
