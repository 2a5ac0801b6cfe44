"""Small networks, plain and of transformers, that hold every type of site."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ---------------------------------------------------------------------- plain modules
class Residual(nn.Module):
    """x + down(gelu(up(norm(x)))), then a projection without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.down(F.gelu(self.up(self.norm(x)))))


class Convolved(nn.Module):
    """A convolution between two pointwise maps, so that its input and its output both carry a gradient."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(torch.sin(x)))) + 0.1


class Looked(nn.Module):
    """Embedding, mean over tokens, head tied to the table or not."""

    def __init__(self, table: nn.Embedding, tied: bool = False) -> None:
        super().__init__()
        self.table, self.mix = table, nn.Linear(table.embedding_dim, table.embedding_dim)
        self.head = nn.Linear(table.embedding_dim, table.num_embeddings, bias=False)
        if tied:
            self.head.weight = table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(ids))))


def looked() -> nn.Module:
    return Looked(nn.Embedding(11, 6, padding_idx=3))


def tied_table() -> nn.Module:
    return Looked(ScaledTable(11, 6, 3), tied=True)


def tied_head() -> nn.Module:
    return Looked(nn.Embedding(11, 6), tied=True)


def normalised() -> nn.Module:
    return Convolved(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


class ScaledTable(nn.Embedding):
    """As Gemma does: rows come out multiplied."""

    def __init__(self, n: int, d: int, padding_idx: int | None = None) -> None:
        super().__init__(n, d, padding_idx)
        self.register_buffer("embed_scale", torch.tensor(d**0.5), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


class Attending(nn.Module):
    """Self- or cross-attention around `nn.MultiheadAttention`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        other = x if context is None else context
        return self.out(x + self.attn(x, other, other, need_weights=False)[0])


class Encoder(nn.Module):
    """torch's own encoder layers, whose evaluation fast path reads weights past every forward."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.out(self.encoder(x, src_key_padding_mask=padding))


class TimmAttention(nn.Module):
    """Attention with one packed projection, as vision transformers in timm write it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class TimmMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TimmBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), TimmAttention(dim, 2)
        self.norm2, self.mlp = nn.LayerNorm(dim), TimmMlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Timm(nn.Module):
    """A vision transformer after the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(TimmBlock(8), TimmBlock(8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))


class Recurrent(nn.Module):
    """An LSTM, which keeps a second list of its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0])


# ---------------------------------------------------------------------- transformers
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip


def _auto(kind: str, model_type: str, **config: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, kind).from_config(transformers.AutoConfig.for_model(model_type, **config))
    for p in made.parameters():  # transformers' small initial weights make every attention uniform
        if p.dim() > 1:
            nn.init.normal_(p, std=0.5 * p.shape[-1] ** -0.5)
    return made


def bert() -> nn.Module:
    return _auto("AutoModel", "bert", **SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def bert_classifier() -> nn.Module:
    return _auto(
        "AutoModelForSequenceClassification", "bert", **SMALL, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, classifier_dropout=0.0,
    )  # fmt: skip


def gpt2() -> nn.Module:
    return _auto(
        "AutoModelForCausalLM", "gpt2", vocab_size=32, n_embd=16, n_layer=1, n_head=4, n_positions=32,
        bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def llama() -> nn.Module:
    return _auto("AutoModelForCausalLM", "llama", **SMALL | {"num_hidden_layers": 2}, num_key_value_heads=2)


def gemma() -> nn.Module:
    return _auto(
        "AutoModelForCausalLM", "gemma3_text", **SMALL, num_key_value_heads=2, head_dim=4, tie_word_embeddings=True,
        query_pre_attn_scalar=4, sliding_window=8,
    )  # fmt: skip


def neox() -> nn.Module:
    return _auto("AutoModelForCausalLM", "gpt_neox", **SMALL)


def falcon() -> nn.Module:
    config = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    return _auto("AutoModelForCausalLM", "falcon", **config, new_decoder_architecture=True, num_kv_heads=2, bias=True)


def mixtral() -> nn.Module:
    return _auto("AutoModelForCausalLM", "mixtral", **SMALL, num_key_value_heads=2, num_local_experts=3,
                 num_experts_per_tok=3)  # fmt: skip


def qwen_moe() -> nn.Module:
    return _auto("AutoModelForCausalLM", "qwen3_moe", **SMALL, num_key_value_heads=2, head_dim=4, num_experts=3,
                 num_experts_per_tok=3, moe_intermediate_size=16)  # fmt: skip


def gpt_oss() -> nn.Module:
    made = _auto("AutoModelForCausalLM", "gpt_oss", **SMALL, num_key_value_heads=2, head_dim=4, num_local_experts=3,
                 num_experts_per_tok=3, sliding_window=8, use_cache=False)  # fmt: skip
    for name, p in made.named_parameters():
        if name.endswith("_bias"):
            nn.init.normal_(p, std=0.1)
    return made


def dual() -> nn.Module:
    """A CLIP; 31 ends a prompt."""
    from transformers import CLIPConfig, CLIPModel

    text = SMALL | {"num_hidden_layers": 2, "eos_token_id": 31}
    vision = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10))


def mamba() -> nn.Module:
    return _auto("AutoModelForCausalLM", "mamba", vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4,
                 use_cache=False)  # fmt: skip


def vit() -> nn.Module:
    return _auto("AutoModel", "vit", hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24,
                 image_size=8, patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
