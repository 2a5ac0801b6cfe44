"""Tiny random models of the architectures that hidden methods are tried on, and oracles written without inlay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
         "initializer_range": 0.3}  # fmt: skip
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": 24, "initializer_range": 0.3, "vocab_size": 40,
        "n_positions": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
CASES = {
    "bert": ("BertForSequenceClassification", {**TEXT, "num_labels": 3}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "llama": ("LlamaForCausalLM", {**TEXT, "num_key_value_heads": 1}),
    "vit": ("ViTForImageClassification", {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 3}),
}
BASES = list(CASES)


def base(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model in evaluation mode, always with the same weights."""
    import transformers

    kind, sizes = CASES[name]
    cls = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(cls.config_class(**{**sizes, **changes})).eval()


def batch(name: str, rows: int = 4, length: int = 9) -> dict[str, Tensor]:
    """Inputs; texts are padded on the right, by one more token per row."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 40, (rows, length), generator=generator)
    mask = torch.arange(length) < length - torch.arange(rows)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def rows_of(inputs: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {name: t[rows] for name, t in inputs.items()}


def blocks(name: str, model: nn.Module) -> nn.ModuleList:
    path = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers", "vit": "vit.layers"}[name]
    return model.get_submodule(path)


def stir(piece: Any, std: float = 0.3, seed: int = 2) -> None:
    """Move every trained number of an adapter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for level in piece.levels:
        for p in level.method.parameters():
            with torch.no_grad():
                p += std * torch.randn(p.shape, generator=generator)


class Then(nn.Module):
    """A module with something after it: y ↦ g(x, y), whether it returns a tensor or a tuple."""

    def __init__(self, inner: nn.Module, g: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.g = inner, g

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(x, *args, **kwargs)
        return self.g(x, out) if isinstance(out, Tensor) else (self.g(x, out[0]), *out[1:])


def then(model: nn.Module, path: str, g: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace one module of an oracle model by itself with `g` after it."""
    model.set_submodule(path, Then(model.get_submodule(path), g))


def dense_bottleneck(p: dict[str, Tensor], h: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """W_up σ(W_down h + b_down) + b_up, by einsum."""
    z = act(torch.einsum("rd,...d->...r", p["down"], h) + p["down_bias"])
    return torch.einsum("or,...r->...o", p["up"], z) + p["up_bias"]


def layer_norm(h: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm from its definition."""
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + shift


ACTS = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
