"""PEFT's ADALORA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from inlay.core.errors import CheckpointError
from inlay.core.hosts import Host, LinearHost, TransposedHost
from inlay.core.method import Method
from inlay.core.sites import Site
from inlay.interop.family import Part, Reading, one_value
from inlay.interop.fields import Field, idle, need, read, refuse
from inlay.interop.lora import LoraFamily
from inlay.interop.matching import tidy
from inlay.interop.modules import Convolution, ModuleFamily, alike, grouped, pads_otherwise
from inlay.methods.schedule.adalora import AdaLoRA

STEPS = 1000
"""The `total_step` that is written, of which `tinit` and `tfinal` are the shares: PEFT wants numbers of steps."""
OWN = {
    "r", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "target_parameters",
    "init_lora_weights", "bias",
}  # fmt: skip
"""Fields of a LoRA that mean something else here."""


class AdaloraFamily(ModuleFamily[AdaLoRA]):
    peft_type: ClassVar[str] = "ADALORA"
    note: ClassVar[str] = (
        "AdaLoRA on Linear, Conv1D and Conv2d, with the triplets that survived; on other modules it is written as a "
        "LoRA. PEFT divides α by r + 10⁻⁵"
    )
    fields: ClassVar[tuple[Field, ...]] = (
        *(field for field in LoraFamily.fields if field.name not in OWN),
        need("init_r", int, "r at the start"), read("target_r", int, 8, "target"),
        read("tinit", int, 0, "start, as a share of total_step"), read("tfinal", int, 0, "end, as a share of it"),
        need("total_step", int), idle("deltaT", "inlay weighs triplets at every step"),
        read("beta1", float, 0.85), read("beta2", float, 0.85), read("orth_reg_weight", float, 0.5, "orthogonality"),
        idle("rank_pattern", "which triplets survived: the tensors tell how many"),
        idle("r", "PEFT does not use it here"), idle("use_rslora", "PEFT does not use it here"),
        idle("alpha_pattern", "PEFT does not use it here"), idle("lora_bias", "PEFT does not use it here"),
        idle("init_lora_weights", "the tensors are in the folder"),
        refuse("use_dora", "PEFT has no DoRA of it", False),
        refuse("target_parameters", "PEFT has no AdaLoRA of parameters"),
        read("bias", str, "none", "'all' and 'lora_only' are BitFit beside it"),
    )  # fmt: skip
    kinds: ClassVar[tuple[type[Method], ...]] = (AdaLoRA,)
    hosts: ClassVar[tuple[type[Host], ...]] = (LinearHost, TransposedHost)
    convolutions: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d,)
    places: ClassVar[str] = "nn.Linear, Conv1D and Conv2d"
    checks: ClassVar[tuple[Callable[[Convolution], str], ...]] = (grouped, pads_otherwise)
    or_lora: ClassVar[bool] = True

    def spec(self, reading: Reading) -> AdaLoRA:
        config = reading.config
        total, r = config["total_step"], config["init_r"]
        if total < 1:
            raise CheckpointError(f"{reading.folder}: 'total_step' must be at least 1, got {total}")
        return AdaLoRA(
            r=r, target=min(config["target_r"], r), alpha=config["lora_alpha"] if config["lora_alpha"] > 0 else r,
            dropout=config["lora_dropout"], start=config["tinit"] / total, end=config["tfinal"] / total,
            beta1=config["beta1"], beta2=config["beta2"], orthogonality=config["orth_reg_weight"],
        )  # fmt: skip

    def part(self, reading: Reading, spec: AdaLoRA, path: str, site: Site) -> Part:
        E, P, Q = (reading.matrix(f"{path}.lora_{name}") for name in "EBA")
        if not len(E):  # all were pruned: one triplet of zero weight, as inlay has it
            E, P, Q = E.new_zeros(1, 1), P.new_zeros(site.d_out, 1), Q.new_zeros(1, site.d_in)
        if len(E) > spec.r:
            raise CheckpointError(
                f"{reading.folder}: '{path}' has {len(E)} triplets, the configuration began with {spec.r}"
            )
        return Part(spec.replace(r=len(E), initial=spec.r), site, {"P": P, "E": E.flatten(), "Q": Q})

    def config(self, methods: Sequence[AdaLoRA], sites: Sequence[Site]) -> dict[str, Any]:
        alpha, target, start, end, dropout, beta1, beta2, weight = alike(
            methods, "alpha", "target", "start", "end", "dropout", "beta1", "beta2", "orthogonality"
        )
        r = one_value((method.initial or method.r for method in methods), "number of triplets at the start")
        alive = {site.path: len(method.survivors()) for method, site in zip(methods, sites, strict=True)}
        pattern = {f"{path}.lora_E": [i < n for i in range(r)] for path, n in alive.items()}
        return {
            "init_r": r, "target_r": target, "lora_alpha": tidy(alpha), "lora_dropout": dropout, "beta1": beta1,
            "beta2": beta2, "orth_reg_weight": weight, "total_step": STEPS,
            "tinit": min(round(start * STEPS), STEPS - round(end * STEPS) - 1), "tfinal": round(end * STEPS),
            "rank_pattern": pattern if any(n < r for n in alive.values()) else None, "init_lora_weights": True,
            "fan_in_fan_out": any(type(site.host) is TransposedHost for site in sites),
        }  # fmt: skip

    def tensors(self, method: AdaLoRA, site: Site) -> dict[str, Tensor]:
        stored = method.stored()
        return {"lora_A": stored["Q"], "lora_B": stored["P"], "lora_E": stored["E"][:, None]}
