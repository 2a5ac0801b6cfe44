"""The cheapest legal path of a weight update, chosen from shapes in one place.

*Factored*: the base product x Wᵀ, then x Δᵀ added through Δ's structure: 3 F flops a step, F = Δ.flops(tokens).
*Effective*: form W′ once, one product x W′ᵀ; forming costs 3 D (D = Δ.dense_flops()), and the backward needs the full
weight gradient, 2 · tokens · d_out · d_in, which the frozen base never does.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from inlay.core.hosts import QuantisedHost
from inlay.core.method import Method, WeightMethod
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
