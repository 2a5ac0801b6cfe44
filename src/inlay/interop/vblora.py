"""PEFT's VBLORA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from inlay.core.hosts import Host, LinearHost, TransposedHost
from inlay.core.method import Method
from inlay.core.sites import Site
from inlay.interop.family import Part, Reading, cannot
from inlay.interop.fields import COMMON, LAYERS, STORED_TRANSPOSED, TARGETS, Field, idle, need, read
from inlay.interop.modules import ModuleFamily, alike
from inlay.methods.weight.vblora import LOGITS, VBLoRA

BANK = "vblora_vector_bank"


class VbloraFamily(ModuleFamily[VBLoRA]):
    peft_type: ClassVar[str] = "VBLORA"
    note: ClassVar[str] = "VBLoRA on Linear and Conv1D with one bank; on other modules it is written as a LoRA"
    fields: ClassVar[tuple[Field, ...]] = (
        *COMMON, *TARGETS, *LAYERS, STORED_TRANSPOSED,
        need("r", int), need("num_vectors", int, "vectors"), need("vector_length", int, "length"),
        read("topk", int, 2, "top"), read("save_only_topk_weights", bool, False, "compact"),
        read("vblora_dropout", float, 0.0), read("bias", str, "none", "'all' and 'vblora_only' are BitFit beside it"),
        idle("init_vector_bank_bound", "the tensors are in the folder"),
        idle("init_logits_std", "the tensors are in the folder"),
    )  # fmt: skip
    kinds: ClassVar[tuple[type[Method], ...]] = (VBLoRA,)
    hosts: ClassVar[tuple[type[Host], ...]] = (LinearHost, TransposedHost)
    places: ClassVar[str] = "nn.Linear and Conv1D"
    or_lora: ClassVar[bool] = True

    def spec(self, reading: Reading) -> VBLoRA:
        config = reading.config
        return VBLoRA(
            r=config["r"], vectors=config["num_vectors"], length=config["vector_length"], top=config["topk"],
            compact=config["save_only_topk_weights"], dropout=config["vblora_dropout"],
        )  # fmt: skip

    def part(self, reading: Reading, spec: VBLoRA, path: str, site: Site) -> Part:
        tensors = dict[str, Tensor]()
        for name in LOGITS:
            key = f"{path}.vblora_{name}"
            if spec.compact:  # of K weights that sum to one all but the last are stored
                first = reading.take(f"{key}_topk_weights")
                logs = torch.cat([first, 1 - first.sum(-1, keepdim=True)], -1).log()
                tensors[f"{name}_at"] = reading.take(f"{key}_topk_indices")
                tensors[f"{name}_below"] = logs[..., 1:] - logs[..., :1]
            else:
                tensors[name] = reading.take(key)
        if site.leads:
            tensors["own_bank"] = reading.take(BANK)
        return Part(spec, site, tensors)

    def together(self, methods: Sequence[VBLoRA]) -> dict[str, Tensor]:
        banks = {id(method.bank): method.bank for method in methods}
        if len(banks) != 1:
            raise cannot(f"PEFT has one bank of vectors for the whole adapter, this one has {len(banks)}")
        return {BANK: methods[0].bank}

    def config(self, methods: Sequence[VBLoRA], sites: Sequence[Site]) -> dict[str, Any]:
        r, vectors, top, compact, dropout = alike(methods, "r", "vectors", "top", "compact", "dropout")
        return {
            "r": r, "num_vectors": vectors, "vector_length": methods[0].bank.shape[1], "topk": min(top, vectors),
            "save_only_topk_weights": compact, "vblora_dropout": dropout,
            "fan_in_fan_out": any(type(site.host) is TransposedHost for site in sites),
        }  # fmt: skip

    def tensors(self, method: VBLoRA, site: Site) -> dict[str, Tensor]:
        found = dict[str, Tensor]()
        for name in LOGITS:
            logits = method.get_parameter(name)
            if not method.compact:
                found[f"vblora_{name}"] = logits
                continue
            largest, at = logits.topk(min(method.top, method.vectors), dim=-1)
            found[f"vblora_{name}_topk_weights"] = largest.softmax(-1)[..., :-1]
            found[f"vblora_{name}_topk_indices"] = at.to(torch.uint8 if method.vectors < 256 else torch.int32)
        return found
