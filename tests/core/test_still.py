"""What methods compute once while nothing trains, and everything after which it must be computed again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.active import attached
from inlay.methods import BOFT, NOLA, OFT, DoRA, LoReFT, VeRA
from inlay.methods.weight import dora, rotations
from laws.cases import stir

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6)).requires_grad_(False)


def adapted(method: inlay.core.method.Method, mode: bool = False) -> nn.Module:
    model = net()
    stir(inlay.adapt(model, method, "0", head=None))
    return model.train(mode)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often DoRA measures its norms."""
    calls: list[int] = []
    measured = dora.DoRA.measured

    def count(self: DoRA) -> Tensor:
        calls.append(1)
        return measured(self)

    with monkeypatch.context() as patch:
        patch.setattr(dora.DoRA, "measured", count)
        yield calls


def tuned(model: nn.Module) -> Tensor:
    """A tensor of the adapter."""
    return next(p for n, p in attached(model).named_parameters() if n.endswith(".B"))


def same_as_fresh(model: nn.Module) -> None:
    """The model's output is that of a copy, which has computed nothing before."""
    with torch.no_grad():
        torch.testing.assert_close(model(X), copy.deepcopy(model)(X), rtol=0, atol=0)


def test_norms_are_measured_once_while_nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(DoRA())
    with counted(monkeypatch) as calls, torch.no_grad():
        first, second = model(X), model(X)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert len(calls) == 1
        with torch.inference_mode():
            model(X)
        assert len(calls) == 1


def replaced(model: nn.Module) -> None:
    owner = next(m for m in attached(model).modules() if "m" in m._parameters)
    owner._parameters["m"] = nn.Parameter(owner._parameters["m"] * 2)


def stepped(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    model(X).sum().backward()
    optimizer.step()  # which moves no version counter


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()})


def rounded(model: nn.Module) -> None:
    model.to(torch.bfloat16).to(torch.float32)  # memory of the first numbers may be that of the last


def written_past(model: nn.Module) -> None:
    tuned(model).data.mul_(2)
    model.eval()


def restored(model: nn.Module) -> None:
    method = next(m for m in attached(model).modules() if isinstance(m, DoRA))
    method.restore({name: t + 1 for name, t in method.stored().items()})


def inferred(model: nn.Module) -> None:
    with torch.inference_mode():
        tuned(model).mul_(2)


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        tuned(model).add_(1)


def base_changed(model: nn.Module) -> None:
    with torch.no_grad():
        model[0]._parameters["weight"].mul_(3)  # type: ignore[index, union-attr]


CHANGES = [replaced, stepped, loaded, rounded, written_past, restored, inferred, in_place, base_changed]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_a_tensor_is_seen(change: Callable[[nn.Module], None]) -> None:
    model = adapted(DoRA())
    with torch.no_grad():
        before = model(X)
    change(model)
    with torch.no_grad():
        assert not torch.equal(model(X), before), "nothing was changed: the test tests nothing"
    same_as_fresh(model)


@pytest.mark.parametrize("method", [DoRA(of=VeRA(r=4)), OFT(block_size=4), BOFT(block_size=4), NOLA(r=2, bases=4),
                                    LoReFT(r=2)], ids=lambda m: type(m).__name__)  # fmt: skip
def test_every_method_that_keeps_something_sees_its_tensors_change(method: inlay.core.method.Method) -> None:
    model = adapted(method)
    with torch.no_grad():
        before = model(X)
        assert attached(model).state.still.kept
        for p in attached(model).parameters():
            p.add_(0.1 * torch.randn_like(p))
        assert not torch.equal(model(X), before)
    same_as_fresh(model)


def test_nothing_is_kept_in_training_with_gradients_or_under_autocast_of_another_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted(DoRA())
    with counted(monkeypatch) as calls:
        model(X), model(X)
        assert len(calls) == 2
        with torch.no_grad():
            model.train()(X), model(X)
            assert len(calls) == 4
            model.eval()(X)
            with torch.autocast("cpu", torch.bfloat16):
                model(X)
            assert len(calls) == 6
        assert len(attached(model).state.still.kept) == 1
        model(X)
        assert not attached(model).state.still.kept


def test_switching_deleting_and_copying_keep_nothing_of_another() -> None:
    model = adapted(DoRA())
    stir(other := inlay.adapt(model, DoRA(), "0", name="second", head=None))
    model.eval()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
        second = model(X)
        inlay.use(model, "default")
        first = model(X)
        inlay.use(model, "second")
        torch.testing.assert_close(model(X), second, rtol=0, atol=0)
        assert not torch.equal(first, second)
        assert not copy.deepcopy(attached(model)).state.still.kept
        inlay.delete(model, "second")
        assert not attached(model).state.still.kept


def test_what_torch_func_computes_is_not_kept() -> None:
    model = adapted(DoRA())
    named = {n: torch.stack([p, p + 1]) for n, p in attached(model).named_parameters()}
    with torch.no_grad():
        plain = model(X)
        several = torch.vmap(lambda t: torch.func.functional_call(attached(model), t, (X,)))(named)
        torch.vmap(lambda t: torch.func.functional_call(model, {f"inlay.{n}": p for n, p in t.items()}, (X,)))(named)
        assert several.shape[0] == 2
        torch.testing.assert_close(model(X), plain, rtol=0, atol=0)


def test_rotations_are_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = adapted(OFT(block_size=4)), []
    solve = torch.linalg.solve
    monkeypatch.setattr(rotations.torch.linalg, "solve", lambda *a: calls.append(1) or solve(*a))
    with torch.no_grad():
        model(X), model(X)
    assert len(calls) == 1
