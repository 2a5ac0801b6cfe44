"""The cheapest legal path of a weight update, chosen from shapes in one place.

*Factored*: the base product x Wᵀ, then x Δᵀ added through Δ's structure: 3 F flops a step, F = Δ.flops(tokens).
*Effective*: form W′ once, one product x W′ᵀ; forming costs 3 D (D = Δ.dense_flops()), and the backward needs the full
weight gradient, 2 · tokens · d_out · d_in, which the frozen base never does.
*Lean*, in training alone: see `inlay.core.lean`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.hosts import LinearHost, QuantisedHost
from inlay.core.lean import Form, Packed, Through
from inlay.core.levels import Level, acts_on_output
from inlay.core.method import Method, WeightMethod
from inlay.core.sharded import is_sharded
from inlay.core.sites import Site


def prefers_effective(levels: list[tuple[Method, Site]], x: Tensor) -> bool:
    """Whether forming W′ is cheaper than acting on outputs, for the input x of the module.

    Only for float32 and wider: in bfloat16 a small ΔW would be rounded away inside W + ΔW. Nor for quantised layers,
    whose own forward reads their own storage.
    """
    factored = effective = 0
    training = torch.is_grad_enabled()
    for method, site in levels:
        update = method.update() if isinstance(method, WeightMethod) else None
        if update is None or site.host is None or not site.host.linear or isinstance(site.host, QuantisedHost):
            return False
        if site.parameter.dtype.itemsize < 4:
            return False
        tokens = x.numel() // site.d_in if site.kernel_area == 1 else x.numel() // x.shape[1]
        size = prod(update.shape)
        # what has no cheaper factored form than itself is formed by its own `apply`; both paths then pay D
        factored += (3 if training else 1) * update.flops(tokens)
        effective += (3 if training else 1) * (update.dense_flops() + size) + (2 * tokens * size if training else 0)
    return effective < factored


@dataclass(frozen=True)
class LeanStep:
    """One forward of a module on the lean path: its input, and W and b as the base holds them."""

    form: Form
    host: LinearHost
    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def formed(self) -> dict[str, Tensor]:
        """W′ and b′ as the module stores them."""
        W = self.host.from_matrix(self.form.formed(self.host.to_matrix(self.weight)), self.weight)
        b = self.form.bias(self.bias)
        return {"weight": W} if b is None or b is self.bias else {"weight": W, "bias": b}

    def through(self, y: Tensor) -> Tensor:
        """The module's output y for x without a graph and W′, as a function of x and of the methods' tensors."""
        W, leaves = self.host.to_matrix(self.weight.detach()), self.form.leaves()
        output: Any = Through.apply(self.form, self.x, y, W, self.bias, *leaves)
        return output


def lean_step(module: nn.Module, levels: Sequence[Level], x: Tensor) -> LeanStep | None:
    """The lean path for the input x of a module, None where it is closed or does not pay.

    Open for float32 and wider linear layers that are frozen, under methods with a `form` and nothing else: no dropout,
    no other hooks on the module (they would see its input without a graph), no autocast, no compiler, which fuses the
    plain path by itself.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return None
    host, weight, bias = levels[0].site.host, module._parameters.get("weight"), module._parameters.get("bias")
    if not isinstance(host, LinearHost) or isinstance(host, QuantisedHost) or not host.hooked or weight is None:
        return None
    if weight.requires_grad or (bias is not None and bias.requires_grad) or is_sharded(weight):
        return None
    if x.is_nested or x.dim() < 2 or x.dtype is not weight.dtype or x.dtype.itemsize < 4:
        return None
    if len(module._forward_pre_hooks) > 1 or len(module._forward_hooks) > 1 or module._backward_hooks:
        return None
    forms = []
    for level in levels:
        method = level.method
        if not isinstance(method, WeightMethod) or not acts_on_output(level):
            return None
        if method.strength != 1.0 or not method.exact_now() or level.site.expert is not None:
            return None
        form = method.form()
        if form is None or not (form.adds or (len(levels) == 1 and level.site.rows is None)):
            return None
        forms.append(form)
    rows = tuple(level.site.rows for level in levels)
    form = forms[0] if rows == (None,) else Packed(tuple(forms), rows)
    return LeanStep(form, host, x, weight, bias) if pays(form, x.numel() // x.shape[-1]) else None


def pays(form: Form, tokens: int) -> bool:
    """Whether a step costs less on the lean path than where the methods act on outputs."""
    return form.lean_flops(tokens) < form.factored_flops(tokens)
