"""Small models, one per type of site, each with what a test must know to rebuild an adapted matrix by hand.

Nothing here uses the library: a `Slot` reads and writes one matrix W (d_out, d_in) of a model by explicit row numbers
and layouts, so oracles stand on their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from laws import nets

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Slot:
    """One matrix: where it is stored and how (d_out, d_in) is read from that."""

    path: str
    param: str = "weight"
    layout: str = "out_in"
    """out_in, in_out (transposed), kernel (convolution), table (embedding: W is the transpose)."""
    rows: tuple[int, ...] | None = None
    expert: int | None = None
    bias: str | None = "bias"
    biases: tuple[int, ...] | None = None
    """Which numbers of the bias, where they are not numbered as the rows."""

    def module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.path)

    def _stored(self, model: nn.Module) -> Tensor:
        p = getattr(self.module(model), self.param).detach()
        return p if self.expert is None else p[self.expert]

    def matrix(self, model: nn.Module) -> Tensor:
        """W in float64."""
        W = self._stored(model).double()
        if self.layout in ("in_out", "table"):
            W = W.T
        elif self.layout == "kernel":
            W = W.reshape(W.shape[0], -1)
        return W if self.rows is None else W[list(self.rows)]

    def vector(self, model: nn.Module) -> Tensor | None:
        """b in float64."""
        b = None if self.bias is None else getattr(self.module(model), self.bias, None)
        if b is None:
            return None
        b = b.detach().double()
        if self.expert is not None:
            b = b[self.expert]
        rows = self.rows if self.biases is None else self.biases
        return b if rows is None else b[list(rows)]

    @torch.no_grad()
    def put(self, model: nn.Module, W: Tensor, b: Tensor | None) -> None:
        """Write W′ and b′ into the model."""
        stored = self._stored(model)
        whole = stored.double()
        if self.layout in ("in_out", "table"):
            whole = whole.T.clone()
        elif self.layout == "kernel":
            whole = whole.reshape(whole.shape[0], -1).clone()
        else:
            whole = whole.clone()
        whole[slice(None) if self.rows is None else list(self.rows)] = W
        stored.copy_((whole.T if self.layout in ("in_out", "table") else whole).reshape(stored.shape))
        if b is not None:
            bias = getattr(self.module(model), self.bias or "").detach()
            if self.expert is not None:
                bias = bias[self.expert]
            rows = self.rows if self.biases is None else self.biases
            bias[slice(None) if rows is None else list(rows)] = b.to(bias.dtype)


@dataclass(frozen=True)
class Bench:
    """A model with inputs, and the places that the families of methods act on."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    slots: tuple[Slot, ...] = ()
    """The matrices that `where` names, in the model's order."""
    where: tuple[str, ...] = ()
    """Patterns for methods that act on matrices."""
    hidden: tuple[str, ...] = ()
    """Patterns for methods that act on activations."""
    tensors: tuple[str, ...] = ("",)
    """Patterns for methods that train copies of base tensors."""
    tokens: bool = False
    """Whether methods that act on the token sequence find one here."""
    prompts: bool = False
    """Whether it compares images with class prompts."""
    routable: bool = True
    quantised: bool = False
    grids: bool = False
    """Whether it has layers on an affine grid."""
    only: frozenset[str] = frozenset()
    """The methods that meet it, where that is not every one with a place here."""

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh copy, always with the same numbers, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = self.build()
            for name, p in model.named_parameters():  # nothing may hide behind a zero bias or a unit scale
                if p.is_floating_point() and p.dim() == 1 and "padding" not in name:
                    p.data += 0.1 * torch.randn_like(p)
        return model.to(dtype).eval()

    def feed(self, dtype: torch.dtype = torch.float32) -> Inputs:
        """The inputs, floating ones in `dtype`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            values = self.inputs()
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}

    def pick(self, inputs: Inputs, rows: list[int]) -> Inputs:
        """The inputs of some rows of the batch."""
        return {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's main output."""
    out = model(**inputs)
    if isinstance(out, Tensor):
        return out
    pooled = out.get("pooler_output")  # every tensor of the model must have a part in the output
    return out[0] if pooled is None else out[0] + pooled[:, None]


# ---------------------------------------------------------------------- inputs
def vectors(*shape: int) -> Callable[[], Inputs]:
    """Random numbers of that shape, the batch first."""
    return lambda: {"x": torch.randn(*shape)}


def words(mask: bool = False) -> Callable[[], Inputs]:
    """Token ids (4, 6), with a row that ends in padding if asked."""

    def make() -> Inputs:
        ids = torch.randint(3, 32, (4, 6))
        if not mask:
            return {"input_ids": ids}
        keep = torch.ones_like(ids)
        keep[1, 4:] = 0
        return {"input_ids": ids, "attention_mask": keep}

    return make


def captioned() -> Inputs:
    """Four images and the prompts of five classes: [1] 5 7 class [9] [31], two classes of two tokens."""
    names = [[11], [12, 13], [14], [15], [16, 12]]
    rows = [[1, 5, 7, *name, 9, 31] for name in names]
    n = max(map(len, rows))
    return {
        "pixel_values": torch.randn(4, 3, 8, 8),
        "input_ids": torch.tensor([row + [0] * (n - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (n - len(row)) for row in rows]),
    }


def padded_ids() -> Inputs:
    ids = torch.randint(0, 11, (4, 6))
    ids[:, -2:] = 3
    return {"ids": ids}


def crossed() -> Inputs:
    """Sequence first, as `nn.MultiheadAttention` has it by default, with a context of another width."""
    return {"x": torch.randn(5, 4, 8), "context": torch.randn(7, 4, 6)}


def padded_vectors() -> Inputs:
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    return {"x": torch.randn(4, 5, 8), "padding": padding}


# ---------------------------------------------------------------------- slots
def per_head(groups: int, group: int, offset: int, length: int) -> tuple[int, ...]:
    """Rows of a matrix whose parts take turns."""
    return tuple(g * group + offset + i for g in range(groups) for i in range(length))


def third(i: int, d: int = 8) -> tuple[int, ...]:
    """Rows of a matrix whose parts follow each other."""
    return tuple(range(i * d, (i + 1) * d))


def mha(path: str) -> tuple[Slot, ...]:
    """Query, key, value and output of an `nn.MultiheadAttention` of width 8."""
    return (*(Slot(path, "in_proj_weight", rows=third(i), bias="in_proj_bias") for i in range(3)),
            Slot(f"{path}.out_proj"))  # fmt: skip


def split_mha(path: str) -> tuple[Slot, ...]:
    """The same where keys and values have a width of their own: three matrices, one bias."""
    parts = (Slot(path, f"{r}_proj_weight", bias="in_proj_bias", biases=third(i)) for i, r in enumerate("qkv"))
    return (*parts, Slot(f"{path}.out_proj"))


def experts(*names: str, layout: str = "out_in", bias: bool = False) -> tuple[Slot, ...]:
    """Three experts' matrices in each of these stacks."""
    path = "model.layers.0.mlp.experts"
    return tuple(Slot(path, n, layout, expert=e, bias=f"{n}_bias" if bias else None) for n in names for e in range(3))


TABLE = (Slot("table", layout="table", bias=None),)
GPT2 = tuple(Slot(f"transformer.h.0.{m}", layout="in_out") for m in ("attn.c_proj", "mlp.c_fc"))
GPT2_QV = tuple(Slot("transformer.h.0.attn.c_attn", layout="in_out", rows=third(k, 16)) for k in (0, 2))
NEOX = tuple(Slot("gpt_neox.layers.0.attention.query_key_value", rows=per_head(4, 12, k * 4, 4)) for k in (0, 2))
FALCON = tuple(Slot("transformer.h.0.self_attention.query_key_value", rows=per_head(2, 16, *of))
               for of in ((0, 8), (12, 4)))  # fmt: skip
TIMM = tuple(Slot(f"blocks.{i}.attn.qkv", rows=third(k)) for i in range(2) for k in (0, 2))
BERT = tuple(Slot(f"encoder.layer.0.{m}") for m in ("attention.self.query", "attention.self.value", "output.dense"))
LLAMA = tuple(Slot(f"model.layers.{i}.{m}", bias=None) for i in range(2)
              for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))  # fmt: skip
VIT = tuple(Slot(f"layers.0.{m}") for m in ("attention.q_proj", "attention.v_proj", "mlp.fc2"))
STATE = tuple(slot for i in range(2) for slot in (
    Slot(f"backbone.layers.{i}.mixer", "A_log", bias=None),
    *(Slot(f"backbone.layers.{i}.mixer.x_proj", rows=tuple(range(at, at + 4)), bias=None) for at in (1, 5)),
))  # fmt: skip
MIXER = tuple(Slot(f"backbone.layers.{i}.mixer.{m}", bias=None) for i in range(2)
              for m in ("in_proj", "x_proj", "out_proj"))  # fmt: skip
ENCODER = (*mha("encoder.layers.0.self_attn"), *mha("encoder.layers.1.self_attn"))
QV, QVD = ("attn.q", "attn.v"), ("attn.q", "attn.v", "mlp.down")
STACKS = ("gate_up_proj", "down_proj")


# ---------------------------------------------------------------------- the benches
def convolution(name: str, conv: Callable[[], nn.Module], *shape: int, bias: bool = True) -> Bench:
    """A bench around one convolution, for inputs of that shape."""
    slot = Slot("conv", layout="kernel", bias="bias" if bias else None)
    return Bench(name, lambda: nets.Convolved(conv()), vectors(*shape), (slot,), ("conv",), ("conv",))


def convolutions() -> list[Bench]:
    """Every stride, padding, padding mode, dilation, grouping and kernel shape at least once."""
    return [
        convolution("conv1d", lambda: nn.Conv1d(4, 6, 3, 2, 2, 2, padding_mode="circular"), 4, 4, 11),
        convolution("conv1d-same", lambda: nn.Conv1d(4, 6, 4, 1, "same", groups=2, padding_mode="reflect"), 4, 4, 9),
        convolution("conv1d-point", lambda: nn.Conv1d(6, 8, 1, groups=2), 4, 6, 9),
        convolution("conv2d", lambda: nn.Conv2d(3, 6, (3, 2), (2, 1), (1, 2), (1, 2)), 4, 3, 7, 8),
        convolution("conv2d-groups", lambda: nn.Conv2d(4, 6, 3, 1, 1, groups=2, padding_mode="reflect", bias=False),
                    4, 4, 6, 5, bias=False),
        convolution("conv2d-depthwise", lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), 4, 4, 6, 5),
        convolution("conv2d-same", lambda: nn.Conv2d(3, 5, (2, 3), 1, "same", 2, padding_mode="circular"), 4, 3, 7, 8),
        convolution("conv3d", lambda: nn.Conv3d(2, 4, (1, 2, 3), (1, 2, 1), (0, 1, 1), groups=2,
                                                padding_mode="replicate"), 4, 2, 3, 5, 4),
    ]  # fmt: skip


@cache
def benches() -> dict[str, Bench]:
    """All of them by name."""
    from laws import quantised

    normed = Slot("conv", layout="kernel")
    found = [
        Bench("linear", nets.Residual, vectors(4, 3, 8), (Slot("up"), Slot("down"), Slot("out", bias=None)),
              ("up", "down", "out"), ("up", "down")),
        *convolutions(),
        Bench("batchnorm", nets.normalised, vectors(4, 3, 6, 5), (normed,), ("conv",), ("conv",)),
        Bench("embedding", nets.looked, padded_ids, TABLE, ("table",), ("table",)),
        Bench("embedding-tied", nets.tied_table, padded_ids, TABLE, ("table",), ("table",)),
        Bench("head-tied", nets.tied_head, padded_ids, (Slot("head", bias=None),), ("head",), ("head",)),
        Bench("gpt2-mlp", nets.gpt2, words(), GPT2, ("attn.o", "mlp.up"), ("mlp",), tokens=True),
        Bench("gpt2-qv", nets.gpt2, words(), GPT2_QV, QV, QV),
        Bench("gemma", nets.gemma, words(), (Slot("model.embed_tokens", layout="table", bias=None),), ("embed",),
              ("attn",), tokens=True),
        Bench("neox", nets.neox, words(), NEOX, QV, ("attn.v",), tokens=True),
        Bench("falcon", nets.falcon, words(), FALCON, QV, ("attn.q",), tokens=True),
        Bench("timm", nets.Timm, vectors(4, 5, 8), TIMM, QV, ("mlp",)),
        Bench("mha", lambda: nets.Attending(batch_first=True), vectors(4, 5, 8), mha("attn"), ("attn",), ("attn",)),
        Bench("mha-split", lambda: nets.Attending(kdim=6, vdim=6), crossed, split_mha("attn"), ("attn",), ("attn",),
              routable=False),
        Bench("encoder", nets.Encoder, vectors(4, 5, 8), ENCODER, ("self_attn",), ("linear2",)),
        Bench("encoder-padded", nets.Encoder, padded_vectors, ENCODER, ("self_attn",), ("linear2",), routable=False),
        Bench("mixtral", nets.mixtral, words(), experts(*STACKS), STACKS, ("mlp",), tokens=True),
        Bench("qwen-moe", nets.qwen_moe, words(), experts("down_proj"), ("mlp.experts.down",), ("mlp",), tokens=True),
        Bench("gpt-oss", nets.gpt_oss, words(), experts(*STACKS, layout="in_out", bias=True), STACKS, ("mlp",),
              tokens=True),
        *quantised.benches(),
        Bench("bert", nets.bert, words(mask=True), BERT, QVD, ("mlp", "attn"), tokens=True),
        Bench("classifier", nets.bert_classifier, words(mask=True), tuple(Slot(f"bert.{s.path}") for s in BERT), QVD,
              ("mlp",), tokens=True),
        Bench("llama", nets.llama, words(), LLAMA, QVD, ("mlp", "attn"), tokens=True),
        Bench("vit", nets.vit, lambda: {"pixel_values": torch.randn(4, 3, 8, 8)}, VIT, QVD, ("mlp",), tokens=True),
        Bench("dual", nets.dual, captioned, tensors=(), prompts=True, routable=False),
        Bench("mamba", nets.mamba, words(), STATE, ("mixer.A", "mixer.B", "mixer.C"), ("mixer.out",),
              ("mixer.A", "mixer.x", "norm1"), only=frozenset({"sdt", "stateoffset", "lora", "full"})),
        Bench("mamba-padded", nets.mamba, words(mask=True), MIXER, ("mixer.in", "mixer.x", "mixer.out"), ("mixer.out",),
              only=frozenset({"stateoffset", "lora", "dora"})),
        Bench("lstm", nets.Recurrent, vectors(4, 5, 6)),
    ]  # fmt: skip
    return {b.name: b for b in found}
