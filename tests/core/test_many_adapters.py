"""The n-th adapter costs what the first did: attaching, switching and deleting touch what is their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import inlay
from inlay.core import mount
from inlay.core.active import attached
from inlay.core.base import base_modules, base_parameters
from inlay.methods import Full, LoRA, VeRA

X = torch.randn(2, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules on which hooks are registered, once for each."""
    found: list[nn.Module] = []
    for name in ("register_forward_pre_hook", "register_forward_hook"):
        register = getattr(nn.Module, name)

        def count(self: nn.Module, *args: object, register: object = register, **options: object) -> object:
            found.append(self)
            return register(self, *args, **options)  # type: ignore[operator]

        monkeypatch.setattr(nn.Module, name, count)
    return found


def test_a_further_adapter_registers_hooks_only_where_none_are(hooks: list[nn.Module]) -> None:
    model = net()
    inlay.adapt(model, LoRA(r=2), "0", name="a", head=None)
    hooks.clear()
    for k in range(3):
        inlay.adapt(model, LoRA(r=2), "0", name=f"b{k}", head=None)
    assert not hooks
    inlay.adapt(model, LoRA(r=2), ["0", "2"], name="c", head=None)
    assert hooks == [model[2]] * 2
    hooks.clear()
    inlay.delete(model, "b1")
    inlay.use(model, "a", "c")
    assert not hooks


def test_loading_walks_the_base_once_and_not_the_other_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = net(), []
    inlay.adapt(model, VeRA(r=4), ["0", "1", "2"], head=None).save(tmp_path)
    walk = nn.Module.named_modules

    def named_modules(self: nn.Module, *args: object, **options: object) -> object:
        for path, module in walk(self, *args, **options):  # type: ignore[arg-type]
            seen.append(module)
            yield path, module

    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    counts = []
    for n in range(4):
        seen.clear()
        inlay.load(model, tmp_path, name=f"n{n}")
        counts.append(len(seen))
    assert counts[1:] == counts[:-1]


def test_switching_asks_only_the_adapters_that_go_and_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    for k in range(5):
        inlay.adapt(model, LoRA(r=2), "0", name=f"a{k}", head=None)
    touched = []
    ask = torch.Tensor.requires_grad_
    monkeypatch.setattr(torch.Tensor, "requires_grad_", lambda t, on=True: touched.append(t) or ask(t, on))
    inlay.use(model, "a1")
    own = {id(p) for name in ("a1", "a4") for p in attached(model).adapters[name].parameters()}
    assert {id(t) for t in touched} == own
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    assert asking == {n for n, _ in model.named_parameters() if n.startswith("inlay.adapters.a1.")}


def test_what_a_module_reads_through_follows_the_adapters_that_are_there() -> None:
    """A trained copy needs the module's tensors read through its mount; LoRA beside it too, nothing after them."""
    model, kind = net(), nn.Linear
    with torch.no_grad():
        plain = model(X)
    inlay.adapt(model, LoRA(r=2), "0", name="lora", head=None)
    full = inlay.adapt(model, Full(), "0", name="full", head=None)
    with torch.no_grad():
        next(full.parameters()).add_(1.0)
        changed = model(X)
        assert not torch.equal(changed, plain)
        inlay.use(model, "lora")
        torch.testing.assert_close(model(X), plain, rtol=0, atol=0)
        inlay.delete(model, "full")
        torch.testing.assert_close(model(X), plain, rtol=0, atol=0)
        assert attached(model).state.mounts["0"].needs.tensors == {"weight": 1, "bias": 1}
        inlay.detach(model)
    assert type(model[0]) is kind
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_the_base_is_told_from_what_is_attached() -> None:
    model = net()
    paths, numbers = list(base_modules(model)), [id(p) for p in base_parameters(model)]
    inlay.adapt(model, LoRA(r=2), "0", head=None)
    assert list(base_modules(model)) == paths
    assert [id(p) for p in base_parameters(model)] == numbers


def test_paths_are_chosen_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = net(), []
    inlay.adapt(model, LoRA(r=2), "0", head=None)
    choose = mount.prefers_effective
    monkeypatch.setattr(mount, "prefers_effective", lambda *a: asked.append(1) or choose(*a))
    with torch.no_grad():
        model(X), model(X), model(torch.randn(5, 8))
    assert len(asked) == 2
    inlay.adapt(model, LoRA(r=4), "0", name="other", head=None)
    with torch.no_grad():
        model(X)
    assert len(asked) == 3
