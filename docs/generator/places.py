"""One small network per type of site: what the support matrix is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.affine import AffineLinear

Inputs = dict[str, Tensor]
ROWS = 4


@dataclass(frozen=True)
class Place:
    """A type of site, a network that has it, and the patterns that name it there."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    where: tuple[str, ...] | None
    """None: each method's own default places."""
    what: str = ""

    def model(self) -> nn.Module:
        """A fresh copy, always with the same numbers."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(7)
            model = self.build()
            for p in model.parameters():
                if p.is_floating_point() and p.dim() == 1:  # nothing may hide behind a zero bias or a unit scale
                    p.data += 0.1 * torch.randn_like(p)
        return model.eval()

    def feed(self) -> Inputs:
        """The same inputs every time, `ROWS` rows."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(11)
            return self.inputs()


class Single(nn.Module):
    """One module between two pointwise maps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.attn(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Every expert on every token, averaged: a stack (experts, out, in) in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(0.4 * torch.randn(3, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eoi->bteo", x, self.up).tanh().mean(2)


class PackedAttention(nn.Module):
    """One projection for queries, keys and values, as timm's vision transformers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(8), PackedAttention(), nn.LayerNorm(8), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """One transformer block in timm's spelling, so that its parts have neutral names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norm = nn.Sequential(Block()), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))


def conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Single(Conv1D(12, 8))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


def vision() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8,
            patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


def decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24, use_cache=False,
        )
    )  # fmt: skip


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaModel

    return MambaModel(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4, use_cache=False))


def vectors(*shape: int) -> Callable[[], Inputs]:
    return lambda: {"x": torch.randn(ROWS, *shape)}


def images() -> Inputs:
    return {"pixel_values": torch.randn(ROWS, 3, 8, 8)}


def ids(name: str) -> Callable[[], Inputs]:
    return lambda: {name: torch.randint(3, 11, (ROWS, 6))}


def single(kind: type[nn.Module], *args: int, **options: int | str) -> Callable[[], nn.Module]:
    return lambda: Single(kind(*args, **options))


PLACES = (
    Place("Linear", single(nn.Linear, 8, 12), vectors(3, 8), ("inner",), "`nn.Linear`"),
    Place("Conv1D", conv1d_of_transformers, vectors(3, 8), ("inner",), "transformers' `Conv1D` (GPT-2)"),
    Place("Conv1d", single(nn.Conv1d, 4, 6, 3, stride=2, padding=1), vectors(4, 9), ("inner",), "`nn.Conv1d`"),
    Place(
        "Conv2d", single(nn.Conv2d, 4, 6, 3, padding="same", groups=2), vectors(4, 6, 5), ("inner",),
        "`nn.Conv2d`, here with groups",
    ),
    Place("Conv3d", single(nn.Conv3d, 2, 4, 3, dilation=2), vectors(2, 6, 5, 6), ("inner",), "`nn.Conv3d`"),
    Place("embedding", single(nn.Embedding, 11, 12), ids("x"), ("inner",), "`nn.Embedding`"),
    Place(
        "packed", Transformer, vectors(5, 8), ("attn.q", "attn.v"),
        "queries and values of one packed query-key-value matrix",
    ),
    Place("MHA", Attending, vectors(5, 8), ("attn",), "`nn.MultiheadAttention`, in- and out-projections"),
    Place(
        "experts", lambda: Single(Experts()), vectors(3, 8), ("inner.up",),
        "stacks of experts held in one three-dimensional parameter",
    ),
    Place(
        "quantised", lambda: Single(AffineLinear(nn.Linear(8, 12))), vectors(3, 8), ("inner",),
        "a linear layer stored in 8 bits (`quantize: int8`)",
    ),
    Place("norm", single(nn.LayerNorm, 12), vectors(3, 12), ("inner",), "a normalisation layer"),
    Place("block", Transformer, vectors(5, 8), ("block",), "the hidden state that leaves a transformer block"),
    Place("tokens", bert, ids("input_ids"), None, "the token sequence and the attentions that read it, of an encoder"),
    Place("decoder", decoder, ids("input_ids"), None, "the same of a decoder"),
    Place("images", vision, images, None, "the pixels and patches that a vision transformer reads"),
    Place("mamba", mamba, ids("input_ids"), None, "the state space of a Mamba layer, for methods made for it"),
)  # fmt: skip
