"""The plain eager loop that every engine must agree with, and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import inlay
from laws.benches import Inputs, benches, run
from laws.cases import Case, model_of, stir

KINDS = {
    "weight": "lora(r=2, alpha=4)",
    "reads-weight": "dora(of=vera(r=4, d_initial=0.5))",
    "hidden": "pfeiffer(r=3)",
    "positions": "loreft(r=2, positions='f2+l1')",
    "prompt": "prompttuning(tokens=3)",
    "prefix": "prefixtuning(tokens=2, reparameterize=true, hidden=6)",
    "copies": "bitfit",
    "head": "linearprobe",
}
"""One method of every kind; each trains the classifier's head beside it."""
RATE = 0.1
Forward = Callable[..., Any]


@dataclass
class Run:
    """What a few training steps gave."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """After the last."""
    start: dict[str, Tensor] = field(default_factory=dict)


def adapted(spec: Any, bench: str = "classifier", **options: Any) -> nn.Module:
    """A bench's model in training mode with a method whose tensors are away from their start; always the same."""
    model = model_of(benches()[bench])
    stir(inlay.adapt(model, spec, **options), by=0.1)
    return model.train()


def lively(case: Case, *feeds: Inputs) -> tuple[Callable[[], nn.Module], float]:
    """Makes a case's model in training mode, always the same, from a start at which no unit of an adapter is dead.

    Beside it a rate at which its steps do not explode.
    """

    def make(seed: int) -> nn.Module:
        model = case.model()
        stir(case.attach(model), seed)
        return model.train()

    for seed in range(1, 6):
        model = make(seed)
        loss_of(model, *feeds).backward()
        gradients = [p.grad for p in trained(model).values()]
        if all(g is not None and g.any() for g in gradients):
            return partial(make, seed), RATE / max(1.0, *(float(g.abs().max()) for g in gradients if g is not None))
    raise AssertionError(f"{case.name}: no gradient reaches some tensors from any start")


def loss_of(forward: Forward, *feeds: Inputs) -> Tensor:
    """The mean over batches of the mean square of the outputs."""
    return torch.stack([run(forward, feed).float().square().mean() for feed in feeds]).mean()  # type: ignore[arg-type]


def recomputed(model: Any, reentrant: bool = False) -> Any:
    """The model with transformers' own checkpointing on."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, *feeds: Inputs, forward: Forward | None = None, steps: int = 3, rate: float = RATE) -> Run:
    """Steps of gradient descent on all feeds together, through `forward` (the model itself unless given)."""
    return descend(model, lambda: loss_of(model if forward is None else forward, *feeds), steps, rate)


def descend(model: nn.Module, loss_now: Callable[[], Tensor], steps: int, rate: float = RATE) -> Run:
    """The plain loop: steps of gradient descent, and what came of them."""
    parameters, found = trained(model), Run()
    found.start = copied(parameters.items())
    optimizer = torch.optim.SGD(parameters.values(), lr=rate, momentum=0.9)
    torch.manual_seed(5)  # what a method draws in its forward
    for k in range(steps):
        loss = loss_now()
        loss.backward()
        if k == 0:
            found.gradients = copied((n, p.grad) for n, p in parameters.items() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        found.losses.append(loss.detach())
    found.parameters = copied(parameters.items())
    return found


def copied(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Plain whole copies; of tensors spread over processes, all of these must ask."""
    return {name: full(t.detach()).clone() for name, t in tensors}


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def same(found: Run, wanted: Run, tolerance: float = 1e-5) -> None:
    """AssertionError unless both took the same steps, relative to each tensor's largest number, and moved at all."""
    assert wanted.gradients.keys() == wanted.parameters.keys() == found.gradients.keys() == found.parameters.keys()
    still = [name for name, g in wanted.gradients.items() if not g.any()]
    assert wanted.gradients, "nothing was compared"
    assert not still, f"no gradient reaches {still}"
    largest = max(float(g.abs().max()) for g in wanted.gradients.values())
    felt = [name for name, g in wanted.gradients.items() if g.abs().max() > 1e-6 * largest]  # not a key's bias
    unmoved = [name for name in felt if found.parameters[name].equal(wanted.start[name])]
    assert not unmoved, f"no step moved {unmoved}"
    assert len(found.losses) == len(wanted.losses)
    close("loss", torch.stack(found.losses), torch.stack(wanted.losses), tolerance)
    for name, g in wanted.gradients.items():
        close(f"gradient of {name}", found.gradients[name], g, tolerance, 0.01 * largest)
    for name, p in wanted.parameters.items():
        close(f"{name} after {len(found.losses)} steps", found.parameters[name], p, tolerance)


def close(what: str, a: Tensor, b: Tensor, tolerance: float, scale: float = 0.0) -> None:
    """AssertionError where two tensors differ by more than the tolerance, of the largest number or of `scale`."""
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} and {tuple(b.shape)}"
    error = float((a - b).abs().max() / b.abs().max().clamp_min(max(scale, 1e-12)))
    assert error <= tolerance, f"{what} differs by {error:.1e} of the largest number"
