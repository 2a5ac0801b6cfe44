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
from torch import Tensor, nn

from inlay.core.affine import AffineLinear
from inlay.core.errors import OptionError
from inlay.core.where import Finder

KINDS = ("nf4", "int8", "int4")


def quantise(model: nn.Module, kind: str, head: Sequence[str] = ()) -> list[str]:
    """Replace the model's linear layers by quantised ones, in place; returns their paths.

    Embeddings, a language model's output layer, the modules of `head`, and layers whose own forward is bypassed
    (`nn.MultiheadAttention`) stay as they are.

    Args:
        kind: `nf4`, `int8` or `int4`.
        head: paths of modules that will be trained.

    Raises:
        OptionError: an unknown kind, or bitsandbytes is not installed.  SiteError: no linear layer.
    """
    if kind not in KINDS:
        raise OptionError(f"unknown quantisation '{kind}' (known: {', '.join(KINDS)})")
    finder = Finder(model, tuple(head))
    paths = [part.path for part in finder.parts("all-linear") if type(finder.modules[part.path]) is nn.Linear]
    paths = [path for path in paths if not isinstance(finder.modules[path.rpartition(".")[0]], nn.MultiheadAttention)]
    for path in paths:
        parent, _, name = path.rpartition(".")
        old = finder.modules[path]
        assert isinstance(old, nn.Linear)
        model.get_submodule(parent).register_module(name, quantised(old, kind).train(old.training))
    return paths


def quantised(layer: nn.Linear, kind: str) -> nn.Module:
    """The layer in few bits; int4 has a scale for every 64 inputs where they divide."""
    if kind == "nf4":
        return NF4Linear(layer)
    if kind == "int8":
        return AffineLinear(layer, bits=8)
    d = layer.in_features
    return AffineLinear(layer, bits=4, groups=d // 64 if d % 64 == 0 else 1)


class NF4Linear(nn.Module):
    """x Ŵᵀ + b with Ŵ in 4-bit NormalFloat: 16 quantiles of a normal distribution, times each 64 numbers' largest.

    The largest ones are kept in 8 bits themselves, 256 sharing a float (double quantisation). bitsandbytes computes;
    its own layer is not used because on CPUs it packs its numbers anew in evaluation mode, which has no backward pass.
    """

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = of.in_features, of.out_features
        codes, state = bitsandbytes().quantize_4bit(
            of.weight.detach().contiguous(), compress_statistics=True, quant_type="nf4"
        )
        self.register_buffer("codes", codes)
        self.register_buffer("largest", state.absmax)
        # bits of floats, so that `.to(torch.bfloat16)` leaves them as they are
        self.register_buffer("scale", state.state2.absmax.view(torch.int32))
        self.register_buffer("offset", state.offset.view(torch.int32))
        self.register_buffer("like", torch.empty(0, dtype=of.weight.dtype))
        self.bias = of.bias

    @property
    def state(self) -> Any:
        """What bitsandbytes wants to know beside the codes."""
        bits, device = bitsandbytes(), self.get_buffer("codes").device
        scales = bits.QuantState(
            absmax=self.get_buffer("scale").view(torch.float32), code=steps(device), blocksize=256, dtype=torch.float32
        )
        return bits.QuantState(
            absmax=self.get_buffer("largest"), shape=torch.Size((self.out_features, self.in_features)),
            code=quantiles(device), blocksize=64, quant_type="nf4", dtype=self.get_buffer("like").dtype,
            offset=self.get_buffer("offset").view(torch.float32), state2=scales,
        )  # fmt: skip

    def dequantize(self) -> Tensor:
        """Ŵ (d_out, d_in)."""
        return bitsandbytes().dequantize_4bit(self.get_buffer("codes"), self.state)

    def forward(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, self.get_buffer("codes"), bias=self.bias, quant_state=self.state)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def bitsandbytes() -> Any:
    """bitsandbytes' functions; OptionError where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that it can do without
    try:
        import bitsandbytes.functional as bits
    except ImportError:
        raise OptionError("nf4 needs bitsandbytes: pip install 'inlay[quantize]'") from None
    return bits


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
    size = sum(b.numel() * b.element_size() for m in layers for b in m.buffers())
    return size, sum(m.in_features * m.out_features for m in layers)
