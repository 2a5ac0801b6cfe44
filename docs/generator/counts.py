"""Trained parameters of every method on well-known architectures, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import inlay
from inlay.architectures import configuration
from inlay.core.building import find_head
from inlay.core.companion import Companion
from inlay.core.errors import InlayError
from inlay.core.method import Method, method_from
from inlay.core.where import Finder
from inlay.models.quantise import quantise
from inlay.plan import fake, skeleton

ARCHITECTURES = ("roberta-base", "gpt2-medium", "llama-7b", "vit-base", "resnet50", "clip-vit-b16")
OWN = {"mamba": "mamba-130m"}
"""Where methods for one architecture are counted instead, by its `model_type`."""


def counted_on(cls: type[Method]) -> tuple[str, ...]:
    """The architectures that a method's page tells the size on."""
    return (OWN[cls.architecture],) if cls.architecture else ARCHITECTURES


@dataclass(frozen=True)
class Count:
    """What `inlay plan` says of a method with its defaults, or why it cannot be attached."""

    sites: int = 0
    adapter: int = 0
    head: int = 0
    base: int = 0
    refused: str = ""


def counts(arch: str, methods: list[str]) -> dict[str, Count]:
    """The counts of `inlay.plan.plan(arch, method, memory=False)`, on one skeleton for all methods."""
    config, task, _ = configuration(arch)
    with fake():
        model = skeleton(config, task, torch.float32)
        return {
            text: count(skeleton(config, task, torch.float32) if method_from(text).needs else model, text)
            for text in methods
        }


def count(model: torch.nn.Module, text: str) -> Count:
    """On the model, or on one whose layers are stored as the method needs them, which is then no longer as it was."""
    governs = isinstance(method_from(text), Companion)  # trains nothing of its own
    try:
        if method_from(text).needs:
            quantise(model, method_from(text).needs, find_head(Finder(model)))
        adapter = inlay.adapt(model, ["lora", text] if governs else text)
    except InlayError as error:
        return Count(refused=str(error).replace(method_from(text).label(), "the method"))
    found = Count(
        0 if governs else sum(not level.head for level in adapter.levels),
        0 if governs else adapter.adapter_parameters, adapter.head_parameters, adapter.base_parameters,
    )  # fmt: skip
    inlay.detach(model)
    return found
