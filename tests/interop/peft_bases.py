"""Tiny random bases of every kind that PEFT adapts, each made anew with the same weights and with an input."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

logging.getLogger("transformers").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Base:
    """A way to make a model and call it."""

    make: Callable[[], nn.Module]
    call: dict[str, Tensor]

    def __call__(self) -> nn.Module:
        torch.manual_seed(1)
        model = self.make().eval()
        with torch.no_grad():
            for p in model.parameters():  # nothing may hide behind a zero bias or a unit scale
                p += 0.1 * torch.randn_like(p)
        return model

    def output(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            out = model(**self.call)
        return out if isinstance(out, Tensor) else out.logits


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
IDS = {"input_ids": torch.arange(24).reshape(3, 8) * 7 % 47 + 3, "attention_mask": torch.ones(3, 8, dtype=torch.long)}


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=16, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**SMALL, intermediate_size=24, max_position_embeddings=16, num_labels=3)
    return transformers.RobertaForSequenceClassification(config)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=50, max_position_embeddings=16, num_labels=3
    )
    return transformers.DistilBertForSequenceClassification(config)


def llama(tied: bool = False, **more: object) -> Callable[[], nn.Module]:
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=tied, **more
    )
    return lambda: transformers.LlamaForCausalLM(config)


def llama_classifier() -> nn.Module:
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=24, num_key_value_heads=1, num_labels=3, pad_token_id=0
    )
    return transformers.LlamaForSequenceClassification(config)


def gemma() -> nn.Module:
    config = transformers.GemmaConfig(**SMALL, intermediate_size=24, num_key_value_heads=1, head_dim=8)
    return transformers.GemmaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **SMALL, intermediate_size=24, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        **SMALL, intermediate_size=16, num_key_value_heads=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


class Convolutions(nn.Module):
    """Convolutions of every dimension, strided, padded, dilated where the kernel is 1, with a linear head."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding="same")
        self.two = nn.Conv2d(6, 5, (3, 2), stride=(1, 2), padding=(1, 0), bias=False)
        self.point = nn.Conv2d(5, 4, 1, dilation=2)
        self.three = nn.Conv3d(4, 3, 2, **options)
        self.out = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).relu().unflatten(2, (4, 6))
        h = self.point(self.two(h).tanh())
        h = self.three(h.unsqueeze(2).repeat(1, 1, 3, 1, 1))
        return self.out(h.flatten(2).mean(2))


class Pixels(nn.Module):
    """Convolutions of images as PEFT's rotations take them: square, 1×1, and one with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 6, 1, stride=2, bias=False)
        self.grouped = nn.Conv2d(6, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.point(self.square(x).tanh()).relu()).flatten(1)


class Attention(nn.Module):
    """torch's own attention, which reads its projections without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


BASES = {
    "bert": Base(bert, IDS),
    "roberta": Base(roberta, IDS),
    "distilbert": Base(distilbert, IDS),
    "llama": Base(llama(), IDS),
    "llama-tied": Base(llama(tied=True), IDS),
    "llama-biased": Base(llama(attention_bias=True), IDS),
    "llama-classifier": Base(llama_classifier, IDS),
    "gemma": Base(gemma, IDS),
    "gpt2": Base(gpt2, IDS),
    "mixtral": Base(mixtral, IDS),
    "gpt-oss": Base(gpt_oss, IDS),
    "resnet": Base(resnet, {"pixel_values": vectors(2, 3, 16, 16)}),
    "conv": Base(Convolutions, {"x": vectors(2, 4, 24)}),
    "pixels": Base(Pixels, {"x": vectors(2, 4, 12, 12)}),
    "attention": Base(Attention, {"x": vectors(2, 5, 16)}),
}
