"""PEFT's ADAPTION_PROMPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from inlay.core.errors import CheckpointError
from inlay.core.levels import Level
from inlay.core.method import Method
from inlay.core.towers import Spot, spots_of
from inlay.interop.family import Family, Part, Reading, Writing, cannot
from inlay.interop.fields import COMMON, Field, need
from inlay.interop.matching import ends
from inlay.methods.tokens.llamaadapter import LLaMAAdapter

KNOWN = ("llama", "mistral")


class AdaptionFamily(Family):
    peft_type: ClassVar[str] = "ADAPTION_PROMPT"
    note: ClassVar[str] = (
        "LLaMAAdapter(gate='plain') of Llama and Mistral, without a task head. Those of GPT-2 are refused: PEFT 0.21.2 "
        "adds what the prompts give after the output projection without it; so are output projections with a bias, "
        "which PEFT adds twice"
    )
    fields: ClassVar[tuple[Field, ...]] = (
        *COMMON,
        need("target_modules", str, "the name of the attentions"),
        need("adapter_len", int), need("adapter_layers", int, "counted from the top"),
    )  # fmt: skip

    def takes(self, method: Method) -> bool:
        return isinstance(method, LLaMAAdapter)

    def read(self, reading: Reading) -> list[Part]:
        config = reading.config
        spec = LLaMAAdapter(tokens=config["adapter_len"], layers=config["adapter_layers"], gate="plain")
        reason = inexpressible(reading.model)
        if reason:
            raise CheckpointError(f"{reading.folder} cannot be read: {reason}")
        (site,) = reading.finder.sites(spec, ["attn"], reading.dtype)
        spots = spots_of(site)
        strange = [spot.path for spot in spots if not ends(spot.path, [config["target_modules"]])] + odd(spots)
        if strange or len(spots) != spec.layers:
            raise CheckpointError(
                f"{reading.folder}: the uppermost {spec.layers} modules named '{config['target_modules']}' of this "
                f"{type(reading.model).__name__} are not attentions that adaption prompts can be read for"
                + (f", as '{strange[0]}'" if strange else f": it has {len(spots)}")
            )
        A = torch.cat([reading.take(f"{path}.adaption_prompt") for path in site.parts])
        g = torch.stack([reading.take(f"{path}.adaption_gate") for path in site.parts])
        return [Part(spec, site, {"A": A, "g": g})]

    def write(self, writing: Writing, levels: Sequence[Level]) -> None:
        method, site = levels[0].method, levels[0].site
        assert isinstance(method, LLaMAAdapter)
        assert site.tower is not None
        if method.gate != "plain":
            raise cannot("PEFT's gate is one number per layer, without tanh: that is LLaMAAdapter(gate='plain')")
        reason = inexpressible(writing.model)
        spots = spots_of(site)
        if reason or odd(spots):
            raise cannot(reason or f"PEFT takes '{odd(spots)[0]}' for another shape, or adds its bias twice")
        if [spot.path for spot in site.tower.spots][-len(site.parts) :] != site.parts:
            raise cannot("PEFT has adaption prompts in the uppermost attentions, this one leaves some of them out")
        for i, path in enumerate(site.parts):
            writing.tensors[f"{path}.adaption_prompt"] = method.A[i : i + 1]
            writing.tensors[f"{path}.adaption_gate"] = method.g[i]
        writing.config |= {
            "target_modules": site.parts[0].rpartition(".")[2], "adapter_len": method.tokens,
            "adapter_layers": len(site.parts),
        }  # fmt: skip


def inexpressible(model: nn.Module) -> str | None:
    """Why PEFT's adaption prompts of this model are others than inlay's; None where they are not."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind == "gpt2":
        return "PEFT adds what adaption prompts give after GPT-2's output projection, without that projection"
    return None if kind in KNOWN else f"PEFT has adaption prompts for {' and '.join(KNOWN)}, this model is '{kind}'"


def odd(spots: Sequence[Spot]) -> list[str]:
    """Attentions that PEFT computes otherwise: heads that do not share the width, an output projection with a bias."""
    return [
        spot.path for spot in spots
        if spot.queries * spot.size != spot.width or spot.module.get_submodule("o_proj")._parameters["bias"] is not None
    ]  # fmt: skip
