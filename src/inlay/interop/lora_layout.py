"""How PEFT lays out the factors of a low-rank update, where that is not how inlay does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inlay.core.levels import Level
from inlay.core.matrices import LowRank
from inlay.core.method import DeltaMethod, Method
from inlay.interop.family import cannot
from inlay.interop.modules import pads_otherwise
from inlay.methods.weight.dora import DoRA
from inlay.methods.weight.lora import LoRA

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Plain:
    """What a LoRA has, of a LoRA or of a method that can be written as one."""

    A: Tensor
    B: Tensor
    r: int
    scale: float
    alpha: float | None
    rank_stabilized: bool
    dropout: float
    bias: bool
    b: Tensor | None


@dataclass
class Update:
    """s·B A of one module, as PEFT stores it."""

    A: Tensor
    B: Tensor
    rank: int
    """r of the configuration (per expert in a stack)."""
    scale: float
    given: float | None = None
    """α where it is known exactly."""
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    def alpha(self, rank_stabilized: bool) -> float:
        """α with which PEFT computes the scale."""
        if self.given is not None:
            return self.given
        return self.scale * (self.rank**0.5 if rank_stabilized else self.rank)


def conv_differs(module: nn.Module) -> str:
    """Why PEFT's update of a convolution is no update of its kernel; empty where it is one."""
    if not isinstance(module, CONVOLUTIONS):
        return ""
    if module.groups > 1:
        return (
            f"with {module.groups} groups PEFT's factor A reads all channels, while the base's kernel, and inlay's A, "
            "have those of one group"
        )
    if any(k > 1 and d > 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)):
        return "PEFT's factor A leaves out the base's dilation"
    return pads_otherwise(module)


def kernel_like(t: Tensor, module: nn.Module, spread: bool) -> Tensor:
    """A factor as PEFT's layer has it: A with the base's kernel (`spread`), B with a kernel of ones."""
    if not isinstance(module, CONVOLUTIONS):
        return t
    if spread:
        return t.reshape(t.shape[0], module.in_channels, *module.kernel_size)
    return t.reshape(*t.shape, *(1 for _ in module.kernel_size))


def vector_like(m: Tensor, module: nn.Module) -> Tensor:
    """DoRA's magnitude as PEFT's layer has it."""
    return m.reshape(1, -1, *(1 for _ in module.kernel_size)) if isinstance(module, CONVOLUTIONS) else m


def split(A: Tensor, B: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """Factors of each expert: A (experts·r, d_in) holds them one after the other, B (d_out, r·experts) interleaved."""
    return list(zip(A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).unbind(2), strict=True))


def join(updates: Sequence[Update], name: str) -> Update:
    """The factors of a stack of experts in one pair."""
    first = updates[0]
    if any((u.rank, u.scale) != (first.rank, first.scale) for u in updates):
        raise cannot(f"'{name}': PEFT has one rank and one scale for all experts of a stack")
    A = torch.cat([u.A for u in updates])
    B = torch.stack([u.B for u in updates], 2).flatten(1)
    return Update(A, B, first.rank, first.scale, first.given)


def together(levels: Sequence[Level]) -> Update:
    """The update of a whole module from those of its levels: ranks add up, parts of a packed matrix get their rows."""
    first = levels[0]
    methods = [level.method for level in levels]
    loras = [lora_of(method) for method in methods]
    if len(levels) == 1 and first.site.rows is None:
        (lora,) = loras
        m = methods[0].m if isinstance(methods[0], DoRA) else None
        return Update(lora.A, lora.B, lora.r, lora.scale, lora.alpha, bias_of(lora, first), m)
    assert first.site.host is not None
    W = first.site.host.to_matrix(first.site.parameter.detach())
    rows = W.shape[0]
    As, Bs, biases = list[Tensor](), list[Tensor](), list[Tensor]()
    scale = loras[0].scale
    for level, lora in zip(levels, loras, strict=True):
        B = lora.B if lora.scale == scale else lora.B * (lora.scale / scale)
        bias = bias_of(lora, level)
        part = level.site.rows
        As.append(lora.A)
        Bs.append(B if part is None else part.put(B.new_zeros(rows, lora.r), B, 0))
        if bias is not None:
            bias = bias * (lora.scale / scale)
            biases.append(bias if part is None else part.put(bias.new_zeros(rows), bias, 0))
    A = torch.cat(As)
    magnitude = together_magnitude(levels, W) if isinstance(methods[0], DoRA) else None
    return Update(A, torch.cat(Bs, 1), A.shape[0], scale, None, sum_of(biases), magnitude)


def together_magnitude(levels: Sequence[Level], W: Tensor) -> Tensor:
    """DoRA's magnitude of a packed matrix: rows that no level adapts keep their norm."""
    m = W.float().norm(dim=1)
    covered = torch.zeros(W.shape[0], dtype=torch.bool)
    for level in levels:
        part, method = level.site.rows, level.method
        assert isinstance(method, DoRA)
        if part is None or part.take(covered, 0).any():
            raise cannot(f"'{level.site.path}': PEFT has one DoRA per row of a matrix")
        covered = part.put(covered, part.take(covered, 0).logical_not(), 0)
        m = part.put(m, method.m.detach().float(), 0)
    return m


def takes(method: Method) -> bool:
    """Whether a method is a LoRA or a DoRA, or has another update of low rank, which is that of a LoRA."""
    of = inner(method)
    return isinstance(of, DeltaMethod) and isinstance(of.delta(), LowRank)


def inner(method: Method) -> Method:
    """What a DoRA is made of; another method itself."""
    return method.of if isinstance(method, DoRA) else method


def lora_of(method: Method) -> Plain:
    """The LoRA that a method is or is made of, or as which it can be written."""
    of = inner(method)
    if isinstance(of, LoRA):
        return Plain(of.A, of.B, of.r, of.scale, of.alpha, of.rank_stabilized, of.dropout, of.bias, of.b)
    assert isinstance(of, DeltaMethod)
    training = of.training
    delta = of.eval().delta()  # while it trains DyLoRA draws a rank
    of.train(training)
    assert isinstance(delta, LowRank)
    A, B = delta.A.detach().contiguous(), delta.B.detach().contiguous()
    base = of.site.bias
    moved = of.bias_of(base)
    b = None if base is None or moved is None or moved is base else (moved - base) / (delta.scale or 1.0)
    return Plain(A, B, delta.rank, delta.scale, None, False, of.dropout, b is not None, b)


def bias_of(lora: Plain, level: Level) -> Tensor | None:
    """The update's bias as PEFT stores it: zero where the base has none."""
    if not lora.bias:
        return None
    return lora.b if lora.b is not None else lora.B.new_zeros(level.site.d_out)


def sum_of(tensors: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(tensors)).sum(0) if tensors else None
