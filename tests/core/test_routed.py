"""Rows of one batch to different adapters: who acts together, and that it gives what each adapter gives alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.method import Method
from inlay.core.routed import Router
from inlay.methods import IA3, OFT, BitFit, DoRA, LoHa, LoRA, VBLoRA, VeRA

NAMES = ["a", "b", "c", "d"]


def routed_model(*methods: Method) -> nn.Module:
    """Two layers with one adapter for each method, moved away from the start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).eval().requires_grad_(False)
    for name, method in zip(NAMES, methods, strict=False):
        adapter = inlay.adapt(model, method, ["0", "2"], name=name, seed=ord(name))
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.3 * torch.randn(p.shape))
    return model


def one_by_one(model: nn.Module, x: Tensor, names: list[str | None]) -> Tensor:
    rows = []
    for i, name in enumerate(names):
        inlay.use(model, *([] if name is None else [name]))
        rows.append(model(x[i : i + 1]))
    return torch.cat(rows)


def groups(model: nn.Module) -> list[list[str]]:
    """Which adapters acted together at the first layer in the last routed forward."""
    router: Router = model.inlay.state.mounts["0"].router
    return sorted(group.names for group in router.found)


@pytest.mark.parametrize("names", [
    ["a", "b", "c", "d"], ["d", "a", "d", "b"], ["a", None, "a", "a", "b", None], ["b"] * 5, ["c", "a", "b", "a"] * 3,
])  # fmt: skip
@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(), LoHa(r=2), OFT(block_size=4), IA3(), VeRA(r=3)], ids=str)
def test_rows_get_what_their_adapter_gives(method: Method, names: list[str | None]) -> None:
    """Whatever the order and however uneven, with gradients and without."""
    model = routed_model(*[method] * 4)
    x = torch.randn(len(names), 3, 8)
    with inlay.route(model, names):
        y = model(x)
    want = one_by_one(model, x, names)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    with torch.no_grad(), inlay.route(model, names):
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)


def test_gradients_reach_each_adapter() -> None:
    model = routed_model(*[DoRA()] * 3)
    names, x = ["a", "c", "a", "b"], torch.randn(4, 3, 8)
    for p in model.inlay.parameters():
        p.requires_grad_()
    with inlay.route(model, names):
        model(x).sin().sum().backward()
    found = {name: p.grad for name, p in model.inlay.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for i, name in enumerate(names):
        inlay.use(model, name)
        model(x[i : i + 1]).sin().sum().backward()
    for name, p in model.inlay.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)
        total += p.grad.abs().sum()
    assert total > 0


def test_who_acts_together() -> None:
    """Adapters of one kind do; other ranks, other options, trained copies and shared banks act apart."""
    model = routed_model(LoRA(r=2), LoRA(r=2), LoRA(r=3), LoRA(r=2, alpha=7.0))
    x = torch.randn(4, 8)
    with torch.no_grad(), inlay.route(model, NAMES):
        y = model(x)
        assert groups(model) == [["a", "b"], ["c"], ["d"]]
    torch.testing.assert_close(y, one_by_one(model, x, list(NAMES)))
    for method in (BitFit(), VBLoRA(r=2, vectors=5, length=4)):
        model = routed_model(method, method)
        with torch.no_grad(), inlay.route(model, ["a", "b"]):
            model(x[:2])
            assert groups(model) == [["a"], ["b"]]


def test_a_changed_tensor_counts_at_once() -> None:
    """Stacks are kept within `route`, and made again when an adapter changes in place; none is left afterwards."""
    model = routed_model(LoRA(r=2), LoRA(r=2))
    x = torch.randn(2, 8)
    with torch.no_grad():
        with inlay.route(model, ["a", "b"]):
            before = model(x)
            kept = model.inlay.state.mounts["0"].router.found[0].stack
            assert torch.equal(model(x), before)
            assert model.inlay.state.mounts["0"].router.found[0].stack is kept
            next(iter(model.inlay.adapters["b"].parameters())).mul_(2.0)
            after = model(x)
        assert torch.equal(after[0], before[0])
        assert not torch.allclose(after[1], before[1])
        torch.testing.assert_close(after, one_by_one(model, x, ["a", "b"]))
    assert not model.inlay.state.mounts["0"].router.found
