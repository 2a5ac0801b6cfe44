"""The same method in `peft`, at the same places and sizes, where `peft` has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
from torch import nn

from inlay.core.method import Method
from inlay.methods import BOFT, IA3, OFT, DoRA, LoHa, LoKr, LoRA, NormTuning, PrefixTuning, PromptTuning, RoAd, VeRA

Twins = dict[type[Method], Callable[[Any, list[str]], peft.PeftConfig | None]]


def dora(method: DoRA, paths: list[str]) -> peft.PeftConfig | None:
    of = method.of
    return None if not isinstance(of, LoRA) else peft.LoraConfig(r=of.r, lora_alpha=2 * of.r, use_dora=True,
                                                                target_modules=paths)  # fmt: skip


TWINS: Twins = {
    LoRA: lambda m, paths: peft.LoraConfig(r=m.r, lora_alpha=2 * m.r, target_modules=paths),
    DoRA: dora,
    VeRA: lambda m, paths: peft.VeraConfig(r=m.r, target_modules=paths, vera_dropout=0.0),
    LoHa: lambda m, paths: peft.LoHaConfig(r=m.r, target_modules=paths),
    LoKr: lambda m, paths: peft.LoKrConfig(r=m.r, target_modules=paths),
    OFT: lambda m, paths: peft.OFTConfig(oft_block_size=m.block_size, target_modules=paths),
    BOFT: lambda m, paths: peft.BOFTConfig(boft_block_size=m.block_size, target_modules=paths),
    RoAd: lambda m, paths: peft.RoadConfig(variant=f"road_{m.variant}", target_modules=paths),
    IA3: lambda m, paths: peft.IA3Config(target_modules=paths, feedforward_modules=[]),
    NormTuning: lambda m, paths: peft.LNTuningConfig(target_modules=paths),
    PromptTuning: lambda m, paths: peft.PromptTuningConfig(num_virtual_tokens=m.tokens, task_type="CAUSAL_LM"),
    PrefixTuning: lambda m, paths: peft.PrefixTuningConfig(num_virtual_tokens=m.tokens, task_type="CAUSAL_LM"),
}


def config(method: Method, paths: list[str]) -> peft.PeftConfig | None:
    """The method's configuration at these modules; None where `peft` has none."""
    make = TWINS.get(type(method))
    return None if make is None else make(method, paths)


def twin(method: Method, model: nn.Module, paths: list[str]) -> nn.Module | None:
    """The model with `peft`'s form of the method on these modules; None where it has none or refuses the places."""
    made = config(method, paths)
    if made is None or (made.is_prompt_learning and model.config.model_type not in ("llama", "gpt2")):
        return None
    try:
        return peft.get_peft_model(model, made)
    except ValueError:
        return None
