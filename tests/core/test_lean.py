"""The lean path: what it keeps, and where it stands aside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core import paths
from inlay.core.method import Method
from inlay.methods import OFT, DoRA, LoHa, LoKr, LoRA, LoRAFA, VeRA
from inlay.train.measure import saved_for_backward

METHODS = [LoRA(r=4), DoRA(), LoHa(r=2), LoKr(r=2), VeRA(r=4), OFT(block_size=8)]
each = pytest.mark.parametrize("method", METHODS, ids=str)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it costs: these layers are small."""
    monkeypatch.setattr(paths, "pays", lambda form, tokens: True)


def adapted(method: Method) -> tuple[nn.Linear, list[Tensor]]:
    torch.manual_seed(0)
    layer = nn.Linear(24, 32)
    tensors = list(inlay.adapt(nn.Sequential(layer), method, "0").parameters())
    with torch.no_grad():
        for p in tensors:
            p.add_(0.2 * torch.randn_like(p))
    return layer, tensors


def lean(y: Tensor) -> bool:
    return "Through" in type(y.grad_fn).__name__


@each
def test_only_the_input_is_kept(method: Method) -> None:
    """Neither W′ nor anything of its size, nor an intermediate as long as the batch; DoRA keeps the output as well."""
    layer, tensors = adapted(method)
    x = torch.randn(4096, 24, requires_grad=True)
    loss, saved = saved_for_backward(lambda: layer(x).sum(), layer)
    assert lean(layer(x))
    kept = 4096 * (24 + (32 if isinstance(method, DoRA) else 0)) * 4
    assert kept <= saved <= kept + 8 * 4 * sum(p.numel() for p in tensors) + 4 * 24 * 32
    loss.backward()
    assert all(p.grad is not None for p in tensors)


def test_a_frozen_projection_keeps_less() -> None:
    """LoRA-FA's point is that x need not be kept: it stays on the path that keeps x Aᵀ."""
    layer, _ = adapted(LoRAFA(r=2))
    x = torch.randn(4096, 24, requires_grad=True)
    _, saved = saved_for_backward(lambda: layer(x).sum(), layer)
    assert saved < 4096 * 4 * 4


@pytest.mark.parametrize("method", [LoRA(r=4), DoRA(), LoHa(r=2), OFT(block_size=8)], ids=str)
def test_twice_differentiable(method: Method) -> None:
    """Second derivatives are those of the factored path."""
    layer, tensors = adapted(method)
    x, found = torch.randn(5, 24, requires_grad=True), []
    for factored in (False, True):
        layer.__dict__["_inlay_mount"].inlay.state.factored = factored
        y = layer(x)
        assert lean(y) is not factored
        first = torch.autograd.grad(y.sin().sum(), [x, *tensors], create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *tensors]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_it_stands_aside() -> None:
    """For hooks that would see an input without a graph, trained base tensors, bfloat16, and no gradients."""
    layer, _ = adapted(LoRA(r=4))
    x = torch.randn(64, 24, requires_grad=True)
    assert lean(layer(x))
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert not lean(layer(x))
    assert seen[0].requires_grad
    hook.remove()
    layer._parameters["weight"].requires_grad_()
    layer(x).sum().backward()
    assert layer._parameters["weight"].grad is not None
    layer._parameters["weight"].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not lean(layer(x))
    with torch.no_grad():
        assert layer(x).grad_fn is None
    layer.to(torch.bfloat16)
    assert not lean(layer(x.bfloat16()))


def test_rows_of_zero_magnitude_are_trained() -> None:
    """DoRA's m = 0 leaves nothing in the output to read its gradient from."""
    layer, tensors = adapted(DoRA())
    m = next(p for p in tensors if p.dim() == 1)
    with torch.no_grad():
        m[::2] = 0.0
    x, found = torch.randn(64, 24), []
    for factored in (False, True):
        layer.__dict__["_inlay_mount"].inlay.state.factored = factored
        found.append(torch.autograd.grad(layer(x).sin().sum(), tensors))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
