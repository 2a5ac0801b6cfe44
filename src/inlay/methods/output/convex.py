"""Linear heads on frozen features by a convex solver: one minimum, no rate, no order, no seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS, PRECISION = 500, 1e-10
PENALTIES = tuple(10.0**n for n in range(1, -7, -1))
"""λ from strong to weak; each solution begins where the one before ended."""

Solution = tuple[Tensor, Tensor]
"""W (outputs, features) and b (outputs,)."""


def logistic(x: Tensor, labels: Tensor, classes: int, l2: float, start: Solution | None = None) -> Solution:
    """argmin mean CE(x Wᵀ + b, labels) + (λ/2) ‖W‖², multinomial logistic regression by L-BFGS in float64."""
    x = x.double()
    W, b = start if start is not None else (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    W, b = (t.double().clone().requires_grad_() for t in (W, b))
    optimizer = torch.optim.LBFGS(
        [W, b], max_iter=STEPS, tolerance_grad=1e-7, tolerance_change=PRECISION, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(x, labels, W, b, l2)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return W.detach(), b.detach()


def objective(x: Tensor, labels: Tensor, W: Tensor, b: Tensor, l2: float) -> Tensor:
    """What `logistic` minimises."""
    return F.cross_entropy(x @ W.T + b, labels) + 0.5 * l2 * W.square().sum()


def ridge(x: Tensor, values: Tensor, l2: float) -> Solution:
    """argmin mean (x wᵀ + b − values)² / 2 + (λ/2) ‖w‖², in closed form in float64."""
    x, y = x.double(), values.double()
    mean, level = x.mean(0), y.mean()
    centred = x - mean
    gram = centred.T @ centred / len(x) + l2 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    w = torch.linalg.solve(gram, centred.T @ (y - level) / len(x))
    return w[None], (level - mean @ w)[None]


def best(
    x: Tensor, fit: Callable[[Tensor, float, Solution | None], Solution], loss: Callable[[Tensor, Tensor], Tensor],
    check: tuple[Tensor, Tensor], penalties: tuple[float, ...] = PENALTIES,
) -> tuple[Solution, float]:  # fmt: skip
    """(the solution on raw features, its λ) with the lowest loss on other rows.

    Features are standardised while λ is chosen, so that one grid suits every network; W and b are given back for the
    features as they are. Features that never vary get no weight.
    """
    x = x.double()
    mean, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 1e-6 * spread.max().clamp_min(1e-30), spread, torch.inf)
    inner, found, lowest = None, None, float("inf")
    for l2 in penalties:
        inner = fit((x - mean) / spread, l2, inner)
        W = inner[0] / spread
        b = inner[1] - W @ mean
        value = float(loss(check[0].double() @ W.T + b, check[1]))
        if found is None or value < lowest:
            found, lowest = ((W, b), l2), value
    assert found is not None
    return found
