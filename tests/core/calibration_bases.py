"""A small model, batches with padding, and what can be told about them without the library's calibration."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import Tensor, nn

import inlay
from inlay.core.active import attached
from inlay.methods import EVA, CorDA, LoRASB

Batches = list[dict[str, Tensor]]
ALL = [EVA(r=3), CorDA(r=3), CorDA(r=3, mode="knowledge"), LoRASB(r=3)]


def bert() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def sentences(count: int = 3, labels: bool = True) -> Batches:
    """Batches of four rows, two of them padded."""
    generator, made = torch.Generator().manual_seed(2), []
    for _ in range(count):
        mask = torch.ones(4, 9, dtype=torch.long)
        mask[0, 5:] = mask[2, 7:] = 0
        batch = {"input_ids": torch.randint(1, 60, (4, 9), generator=generator), "attention_mask": mask}
        made.append(batch | ({"labels": torch.randint(0, 3, (4,), generator=generator)} if labels else {}))
    return made


def inputs_of(model: nn.Module, path: str, batches: Batches) -> Tensor:
    """What real tokens bring to a module, (n, d), collected from a plain model."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches, strict=True)]).double()


def gradient_of(model: nn.Module, path: str, batches: Batches, name: str = "weight") -> Tensor:
    """The summed gradient of a tensor, from a plain model."""
    plain = copy.deepcopy(model).requires_grad_(True)
    for batch in batches:
        plain(**batch).loss.backward()
    grad = plain.get_submodule(path)._parameters[name].grad
    assert grad is not None
    return grad


def numbers(adapter: inlay.Adapter) -> dict[str, Tensor]:
    own = attached(adapter.model).adapters[adapter.name]
    return {n: t.clone() for n, t in own.state_dict().items() if isinstance(t, Tensor)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
