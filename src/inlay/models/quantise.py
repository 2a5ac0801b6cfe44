"""Linear layers of a model stored in few bits.

`nf4` is bitsandbytes' 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): its
kernels run on CPUs and are at home on CUDA. `int8` and `int4` are affine, see `inlay.core.affine`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.affine import AffineLinear
from inlay.core.errors import OptionError, SiteError
from inlay.core.hollow import hollow
from inlay.core.where import Finder

KINDS = ("nf4", "int8", "int4")


def quantise(model: nn.Module, kind: str, head: Sequence[str] = (), group: int | None = None) -> list[str]:
    """Replace the model's linear layers by quantised ones, in place; returns their paths.

    Embeddings, a language model's output layer, the modules of `head`, and layers whose own forward is bypassed
    (`nn.MultiheadAttention`) stay as they are.

    Args:
        kind: `nf4`, `int8` or `int4`.
        head: paths of modules that will be trained.
        group: inputs that share a scale on an affine grid, where it divides their number, else a whole row does; by
            default 64 for int4 and a row for int8.

    Raises:
        OptionError: an unknown kind, or bitsandbytes is not installed.  SiteError: no linear layer.
    """
    check_kind(kind, group)
    layers = linear_layers(model, head)
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).register_module(name, quantised(layer, kind, group).train(layer.training))
    return list(layers)


def check_kind(kind: str, group: int | None) -> None:
    """OptionError where no layer can be stored so."""
    if kind not in KINDS:
        raise OptionError(f"unknown quantisation '{kind}' (known: {', '.join(KINDS)})")
    if kind == "nf4" and group is not None:
        raise OptionError("nf4 has groups of 64 always: a group size is for int4 and int8")


def linear_layers(model: nn.Module, head: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """The layers that `quantise` replaces, by path; SiteError where there is none."""
    finder = Finder(model, tuple(head))
    layers = {part.path: finder.modules[part.path] for part in finder.parts("all-linear")}
    parents = {path: finder.modules[path.rpartition(".")[0]] for path in layers}
    found = {
        path: layer
        for path, layer in layers.items()
        if type(layer) is nn.Linear and not isinstance(parents[path], nn.MultiheadAttention)
    }
    if not found:
        raise SiteError(f"{type(model).__name__} has no `nn.Linear` that could be stored in few bits")
    return found


def quantised(layer: nn.Linear, kind: str, group: int | None = None) -> NF4Linear | AffineLinear:
    """The layer in few bits, see `quantise`."""
    if kind == "nf4":
        return NF4Linear(layer)
    bits, d = int(kind.removeprefix("int")), layer.in_features
    group = group or (64 if bits <= 4 else d)
    return AffineLinear(layer, bits, groups=d // group if d % group == 0 else 1)


class NF4Linear(nn.Module):
    """x Ŵᵀ + b with Ŵ in 4-bit NormalFloat: 16 quantiles of a normal distribution, times each 64 numbers' largest.

    The largest ones are kept in 8 bits themselves, 256 sharing a float (double quantisation). bitsandbytes computes;
    its own layer is not used because on CPUs it packs its numbers anew in evaluation mode, which has no backward pass.
    """

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = of.in_features, of.out_features
        codes, largest, scale, offset = nf4_shapes(of.weight) if hollow(of.weight) else nf4(of.weight)
        self.register_buffer("codes", codes)
        self.register_buffer("largest", largest)
        # bits of floats, so that `.to(torch.bfloat16)` leaves them as they are
        self.register_buffer("scale", scale.view(torch.int32))
        self.register_buffer("offset", offset.view(torch.int32))
        self.register_buffer("like", torch.empty(0, dtype=of.weight.dtype))
        self.bias = of.bias

    @property
    def state(self) -> Any:
        """What bitsandbytes wants to know beside the codes."""
        bits, codes = bitsandbytes(), self.get_buffer("codes")
        first, second = codebooks(codes)
        scales = bits.QuantState(
            absmax=self.get_buffer("scale").view(torch.float32), code=second, blocksize=256, dtype=torch.float32
        )
        shape = (self.out_features, self.in_features) if self.aligned else (self.out_features * self.in_features,)
        return bits.QuantState(
            absmax=self.get_buffer("largest"), shape=torch.Size(shape),
            code=first, blocksize=64, quant_type="nf4", dtype=self.get_buffer("like").dtype,
            offset=self.get_buffer("offset").view(torch.float32), state2=scales,
        )  # fmt: skip

    def dequantize(self) -> Tensor:
        """Ŵ (d_out, d_in)."""
        values = bitsandbytes().dequantize_4bit(self.get_buffer("codes"), self.state)
        return values.view(self.out_features, self.in_features)

    @property
    def aligned(self) -> bool:
        """Whether blocks end where rows do. bitsandbytes' kernels for CPUs give wrong numbers where they do not, but
        right ones for the matrix as a single row."""
        return self.in_features % 64 == 0

    def alike(self, layer: nn.Linear) -> NF4Linear:
        """Another layer in the same storage."""
        return NF4Linear(layer)

    def forward(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        if not self.aligned:
            return F.linear(x, self.dequantize().to(x.dtype), self.bias)
        return matmul_4bit(x, self.get_buffer("codes"), bias=self.bias, quant_state=self.state)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def nf4(W: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, the blocks' largest numbers in 8 bits, and the scales and the offset of those, float32."""
    codes, state = bitsandbytes().quantize_4bit(W.detach().contiguous(), compress_statistics=True, quant_type="nf4")
    return codes, state.absmax, state.state2.absmax, state.offset


def nf4_shapes(W: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for a matrix without numbers."""
    blocks = -(-W.numel() // 64)
    codes, largest = W.new_empty((W.numel() + 1) // 2, 1, dtype=torch.uint8), W.new_empty(blocks, dtype=torch.uint8)
    return codes, largest, W.new_empty(-(-blocks // 256), dtype=torch.float32), W.new_empty((), dtype=torch.float32)


def bitsandbytes() -> Any:
    """bitsandbytes' functions; OptionError where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that it can do without
    try:
        import bitsandbytes.functional as bits
    except ImportError:
        raise OptionError("nf4 needs bitsandbytes: pip install 'inlay[quantize]'") from None
    return bits


def codebooks(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of NF4 and of the second quantisation, beside these codes."""
    if hollow(codes):  # those that are kept for later must not be without numbers
        return codes.new_empty(16, dtype=torch.float32), codes.new_empty(256, dtype=torch.float32)
    return quantiles(codes.device), steps(codes.device)


@cache
def quantiles(device: torch.device) -> Tensor:
    """The 16 numbers of NF4."""
    return bitsandbytes().get_4bit_type("nf4", device=device)


@cache
def steps(device: torch.device) -> Tensor:
    """The 256 numbers of the second quantisation."""
    return bitsandbytes().create_dynamic_map().to(device)


def stored_bytes(model: nn.Module) -> tuple[int, int]:
    """(bytes, numbers) of the matrices that `quantise` stored, scales of every level included; biases are not."""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear | AffineLinear)]
    size = sum(t.nbytes for m in layers for t in m.state_dict().values())
    size -= sum(m.bias.nbytes for m in layers if m.bias is not None)
    return size, sum(m.in_features * m.out_features for m in layers)
