"""Hosts: how a kind of module stores a matrix W (d_out, d_in) and applies it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from inlay.core.errors import SiteError
from inlay.core.hollow import hollow
from inlay.core.matrices import LowRank, Matrix
from inlay.core.products import Tap
from inlay.core.quantised import is_quantised


class Host(ABC):
    """How one kind of module stores, applies and shapes its matrix."""

    hooked: ClassVar[bool] = True
    """Whether the module's own forward applies the matrix, so that inputs and outputs can be seen."""
    linear: ClassVar[bool] = True
    """Whether the input is a batch of vectors along the feature axis (an embedding's ids are not)."""

    @abstractmethod
    def to_matrix(self, p: Tensor) -> Tensor:
        """The stored tensor as (d_out, d_in), a view."""

    @abstractmethod
    def from_matrix(self, W: Tensor, like: Tensor) -> Tensor:
        """(d_out, d_in) in the shape of the stored tensor `like`."""

    @abstractmethod
    def apply(self, module: nn.Module, delta: Matrix, x: Tensor) -> Tensor:
        """What the module would output with Δ for its matrix and no bias."""

    def add(self, module: nn.Module, delta: Matrix, x: Tensor, y: Tensor) -> Tensor:
        return y + self.apply(module, delta, x)

    def vectors(self, module: nn.Module, x: Tensor) -> Tensor:
        """The vectors (n, d_in) that the matrix acts on when the module is given x."""
        raise SiteError(f"{type(module).__name__} has no input vectors")

    def outward(self, v: Tensor, y: Tensor) -> Tensor:
        """A vector over d_out, shaped to broadcast against the module's output y."""
        return v

    def inward(self, v: Tensor, x: Tensor) -> Tensor:
        """A vector over d_in, shaped to broadcast against the module's input x."""
        return v


class LinearHost(Host):
    """`nn.Linear` and everything that computes x Wᵀ + b with W stored (out, in)."""

    def to_matrix(self, p: Tensor) -> Tensor:
        return p

    def from_matrix(self, W: Tensor, like: Tensor) -> Tensor:
        return W

    def apply(self, module: nn.Module, delta: Matrix, x: Tensor) -> Tensor:
        return delta.apply(x)

    def add(self, module: nn.Module, delta: Matrix, x: Tensor, y: Tensor) -> Tensor:
        return delta.add_to(y, x)

    def vectors(self, module: nn.Module, x: Tensor) -> Tensor:
        return torch.cat(x.unbind()) if x.is_nested else x.reshape(-1, x.shape[-1])


class QuantisedHost(LinearHost):
    """A linear layer whose W is stored in few bits (`inlay.core.quantised`): read densely, never written."""


class TransposedHost(LinearHost):
    """transformers' `Conv1D`: a linear layer that stores (in, out)."""

    def to_matrix(self, p: Tensor) -> Tensor:
        return p.T

    def from_matrix(self, W: Tensor, like: Tensor) -> Tensor:
        return W.T


class ConvHost(Host):
    """`nn.Conv1d/2d/3d` with any stride, padding, padding mode, dilation and groups.

    W is the kernel flattened to (c_out, c_in/groups · k…). A low-rank Δ = B A is the convolution with A's r kernels
    followed by the 1×1 convolution B (LoCon); with groups each group sees A on its own channels.
    """

    def __init__(self, axes: int) -> None:
        self.axes = axes  # of the kernel; an input may come without a batch

    def to_matrix(self, p: Tensor) -> Tensor:
        return p.flatten(1)

    def from_matrix(self, W: Tensor, like: Tensor) -> Tensor:
        return W.reshape(like.shape)

    def apply(self, module: nn.Module, delta: Matrix, x: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        kernel = (module.in_channels // module.groups, *module.kernel_size)
        if isinstance(delta, Tap) and (seen := under_tap(module, delta.tap, x)) is not None:
            A = delta.A.to(x.dtype).reshape(*delta.A.shape, *(1 for _ in module.kernel_size))
            return convolve(module)(seen, A, groups=module.groups)
        if not isinstance(delta, LowRank):
            return module._conv_forward(x, delta.dense().to(x.dtype).reshape(-1, *kernel), None)
        A = delta.A.to(x.dtype).reshape(delta.rank, *kernel)
        A = A.repeat(module.groups, *(1 for _ in kernel))  # every group applies the same r kernels to its channels
        h = module._conv_forward(x, A, None)
        B = (delta.scale * delta.B).to(x.dtype).reshape(*delta.B.shape, *(1 for _ in module.kernel_size))
        return convolve(module)(h, B, groups=module.groups)

    def vectors(self, module: nn.Module, x: Tensor) -> Tensor:
        """The patches under the kernel, those of every group: what the convolution with each unit kernel picks out."""
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        x = x if x.dim() == self.axes + 2 else x[None]
        d = module.in_channels // module.groups * prod(module.kernel_size)
        unit = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, -1, *module.kernel_size)
        units = unit.repeat(module.groups, *(1 for _ in unit.shape[1:]))
        return module._conv_forward(x, units, None).unflatten(1, (-1, d)).movedim(2, -1).reshape(-1, d)

    def outward(self, v: Tensor, y: Tensor) -> Tensor:
        return v.reshape(-1, *(1 for _ in range(self.axes)))

    def inward(self, v: Tensor, x: Tensor) -> Tensor:
        raise SiteError(
            "a convolution's input has channels, its matrix has channels × kernel: scale its output instead"
        )


def convolve(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Callable[..., Tensor]:
    """The convolution along as many axes as a module's."""
    return {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(module.kernel_size)]


def under_tap(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, tap: int, x: Tensor) -> Tensor | None:
    """What one tap of a convolution's kernel reads at every place of its output; None where that is partly padding."""
    if isinstance(module.padding, str):
        return None
    cuts: list[slice] = []
    axes = zip(module.kernel_size, module.stride, module.padding, module.dilation, x.shape[-len(module.kernel_size) :],
               strict=True)  # fmt: skip
    for axis, (k, stride, padding, dilation, length) in reversed(list(enumerate(axes))):
        tap, at = divmod(tap, k) if axis else (0, tap)
        begin, places = at * dilation - padding, (length + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        end = begin + (places - 1) * stride + 1
        if begin < 0 or end > length:
            return None
        cuts.insert(0, slice(begin, end, stride))
    return x[(slice(None),) * (x.dim() - len(cuts)) + tuple(cuts)]


class EmbeddingHost(Host):
    """`nn.Embedding`, also where the module scales its output (Gemma): W = Eᵀ, the scale is read off by probing."""

    linear = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def to_matrix(self, p: Tensor) -> Tensor:
        return p.T

    def from_matrix(self, W: Tensor, like: Tensor) -> Tensor:
        return W.T

    def apply(self, module: nn.Module, delta: Matrix, x: Tensor) -> Tensor:
        assert isinstance(module, nn.Embedding)
        rows = delta.columns(x)
        if module.padding_idx is not None:
            # as F.embedding does: the padding row is read but never trained
            rows = torch.where((x == module.padding_idx).unsqueeze(-1), rows.detach(), rows)
        return rows if self.scale == 1.0 else rows * self.scale

    def add(self, module: nn.Module, delta: Matrix, x: Tensor, y: Tensor) -> Tensor:
        return y + self.apply(module, delta, x).to(y.dtype)

    def inward(self, v: Tensor, x: Tensor) -> Tensor:
        raise SiteError("an embedding reads ids, there is no input vector to scale")


class NormHost(Host):
    """A normalisation with a gain per feature: W (d, 1) is the gain γ, or 1 + γ where the module computes so (Gemma).

    Only methods that act row by row make sense of it; those say `everywhere`.
    """

    linear = False

    def __init__(self, axes: int, plus: float = 0.0) -> None:
        self.axes, self.plus = axes, plus  # axes that follow the features in an input: those of a map, or none

    def to_matrix(self, p: Tensor) -> Tensor:
        return (p if self.plus == 0.0 else p + self.plus)[:, None]

    def from_matrix(self, W: Tensor, like: Tensor) -> Tensor:
        return W[:, 0] - self.plus

    def apply(self, module: nn.Module, delta: Matrix, x: Tensor) -> Tensor:
        raise SiteError("a normalisation holds no matrix that could be added to: scale or shift its output")

    def outward(self, v: Tensor, y: Tensor) -> Tensor:
        return v.reshape(-1, *(1 for _ in range(y.dim() - 2))) if self.axes else v


class StoredHost(LinearHost):
    """A matrix that no module forward applies by itself: `nn.MultiheadAttention` projections, experts' stacks.

    Methods act on it through the tensor the module reads, so they need a closed form.
    """

    hooked = False


class StoredTransposedHost(TransposedHost):
    """The same, stored (in, out)."""

    hooked = False


def output_scale(module: nn.Embedding) -> float:
    """The factor by which an embedding module multiplies its rows (Gemma: √d), found by calling it; 1 if plain."""
    if type(module).forward is nn.Embedding.forward or hollow(module.weight):
        return 1.0
    with torch.no_grad():
        ids = module.weight.norm(dim=1).argmax()[None]
        row, out = module.weight[ids].double(), type(module).forward(module, ids).double()
        scale = float((row * out).sum() / row.square().sum().clamp_min(1e-300))
        if not torch.allclose(out, scale * row, rtol=1e-2):
            raise SiteError(f"{type(module).__name__} does more than look up and scale rows: it cannot be adapted")
    return scale


def norm_host(module: nn.Module) -> NormHost | None:
    """The host of a normalisation with a gain, None where the module is none that inlay can write in closed form."""
    gain = module._parameters.get("weight")
    if gain is None or gain.dim() != 1:
        return None
    if isinstance(module, _NormBase | nn.GroupNorm):
        return NormHost(1)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return NormHost(0)
    if "norm" not in type(module).__name__.lower():
        return None
    return NormHost(0) if hollow(gain) else _root_mean_square(module, gain)


def operation(module: nn.Module, parent: nn.Module | None = None) -> Host | None:
    """The host of a layer that computes: linear, convolution, normalisation; no table, nothing that a parent reads."""
    host = host_of(module, parent) or norm_host(module)
    return None if host is None or not host.hooked or isinstance(host, EmbeddingHost) else host


@torch.no_grad()
def _root_mean_square(module: nn.Module, gain: Tensor) -> NormHost | None:
    """transformers' own RMSNorm classes, told apart by calling them: x/rms(x) ⊙ γ, or ⊙ (1 + γ)."""
    x = torch.linspace(-1, 2, gain.numel(), device=gain.device).to(gain.dtype)[None]
    y, unit = type(module).forward(module, x).double(), x.double() / x.double().square().mean().sqrt()
    for plus in (0.0, 1.0):
        if torch.allclose(y, unit * (gain.double() + plus), rtol=2e-2, atol=2e-2):
            return NormHost(0, plus)
    return None


def host_of(module: nn.Module, parent: nn.Module | None = None) -> Host | None:
    """The host of a module's own `weight`, or None where inlay knows no matrix there."""
    if is_quantised(module):
        return None if isinstance(parent, nn.MultiheadAttention) else QuantisedHost()
    if isinstance(parent, nn.MultiheadAttention) and isinstance(module, nn.Linear):
        return StoredHost()  # its weight is read by the parent, its forward is never called
    if isinstance(module, nn.Linear):
        return LinearHost()
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvHost(len(module.kernel_size))
    if isinstance(module, nn.Embedding):
        return EmbeddingHost(output_scale(module)) if module.max_norm is None else None
    if type(module).__name__ == "Conv1D" and isinstance(module._parameters.get("weight"), nn.Parameter):
        return TransposedHost()
    return None
