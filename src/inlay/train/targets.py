"""Regression heads that start where their labels are, whatever the labels' scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from inlay.core.adapter import Adapter
from inlay.core.head import Head


@torch.no_grad()
def start_at_labels(adapter: Adapter, fresh: Sequence[str], labels: Sequence[float]) -> float:
    """Let a freshly initialised regression head begin as a guess of the mean, in the unit of the labels' deviation.

    A bias that starts at zero crawls towards a mean of 2.7 at a thousandth a step, and until it is there its error is
    all that the gradient speaks of. So b starts at the labels' mean, W at deviation times its start, and the rate of
    both is in that unit. With a squared error in that unit too, training is that on standardised labels, step for step,
    while outputs are labels all along.

    Args:
        fresh: paths of the modules that the checkpoint did not bring. A trained output layer is left as it is.
        labels: of the training rows. Their mean is left to training where the output layer has no bias.

    Returns:
        The unit: the deviation of the labels; 1 where no output layer is fresh.
    """
    values = torch.tensor(labels, dtype=torch.float64)
    spread = float(values.std(correction=0)) or 1.0
    levels = [lv for lv in adapter.levels if isinstance(lv.method, Head) and under(lv.site.path, fresh)]
    linear = [lv.site.module for lv in levels if isinstance(lv.site.module, nn.Linear)]
    outputs = [module for module in linear if module.out_features == 1]
    if not outputs:
        return 1.0
    for level in levels:
        if level.site.module is outputs[-1]:
            assert isinstance(level.method, Head)
            level.method.unit = spread
            if level.site.param == "weight":
                level.method.value.mul_(spread)
            else:
                level.method.value.fill_(float(values.mean()))
    return spread


def under(path: str, roots: Sequence[str]) -> bool:
    """Whether a module lies in one of these or is one of them."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)
