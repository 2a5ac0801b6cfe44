"""What methods start from after a calibration, against the papers' equations on plain tensors; alone and nested."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from calibration_bases import ALL, Batches, bert, gradient_of, inputs_of, sentences
from torch import Tensor, nn

import inlay
from inlay.core.errors import OptionError
from inlay.core.method import Method
from inlay.core.statistics import Calibrated
from inlay.methods import EVA, CorDA, DeltaLoRA, DoRA, DyLoRA, LoRASB, ReLoRA
from laws.checks import gap

QV = ("attn.q", "attn.v")


def test_eva_is_the_principal_components_of_the_inputs() -> None:
    model, batches = bert(), sentences()
    adapter = inlay.adapt(model, EVA(r=3, rho=1.0, tau=1.0), QV)
    inlay.calibrate(model, batches)
    for level in adapter.levels[:-2]:
        X = inputs_of(bert(), level.site.path, batches)
        _, _, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
        A = level.method.A.detach().double()
        torch.testing.assert_close((A @ Vh[:3].T).abs(), torch.eye(3).double(), atol=1e-2, rtol=0)
        torch.testing.assert_close(A @ A.T, torch.eye(3).double(), atol=1e-5, rtol=0)
        assert not level.method.B.any()
        assert int(level.method.samples) == len(X) == 3 * 30


def test_eva_not_centred_takes_the_inputs_as_they_are() -> None:
    model, batches = bert(), sentences()
    adapter = inlay.adapt(model, EVA(r=2, rho=1.0, tau=1.0, centred=False), "block[1].attn.q")
    inlay.calibrate(model, batches)
    X = inputs_of(bert(), adapter.levels[0].site.path, batches)
    Vh = torch.linalg.svd(X, full_matrices=False).Vh
    assert (adapter.levels[0].method.A.detach().double() @ Vh[:2].T).abs().diag().min() > 1 - 1e-4


def test_eva_shares_ranks_out_by_explained_variance() -> None:
    model, batches, where = bert(), sentences(), ("attn.q", "attn.o", "mlp.up", "mlp.down")
    adapter = inlay.adapt(model, EVA(r=4, rho=2.0, tau=1.0), where)
    inlay.calibrate(model, batches)
    levels = [lv for lv in adapter.levels if not lv.head]
    explained = []
    for level in levels:
        X = inputs_of(bert(), level.site.path, batches)
        squares = torch.linalg.svdvals(X - X.mean(0)).square()
        explained.append((squares / squares.sum())[:8])
    bar = torch.cat(explained).sort(descending=True).values[4 * len(levels) - 1]
    expected = [int((part >= bar).sum()) for part in explained]
    assert [len(lv.method.A) for lv in levels] == expected
    assert sum(expected) == 4 * len(levels)
    assert len(set(expected)) > 1, "a test of sharing needs places that differ"
    assert all(lv.method.scale == 8 / 4 for lv in levels), "the scale is that of the rank asked for"


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_corda_is_the_split_of_the_weights_in_the_inputs_metric(mode: str) -> None:
    model, batches = bert(), sentences()
    adapter = inlay.adapt(model, CorDA(r=3, alpha=5, mode=mode, damping=0.01), QV)
    inlay.calibrate(model, batches)
    for level in adapter.levels[:-2]:
        X, W = inputs_of(bert(), level.site.path, batches), level.site.weight.double()
        C = X.T @ X
        C += 0.01 * C.diagonal().mean() * torch.eye(len(C)).double()
        U, S, Vh = torch.linalg.svd(W @ C)
        part = slice(0, 3) if mode == "instruction" else slice(len(S) - 3, None)
        expected = (U[:, part] * S[part]) @ Vh[part] @ torch.linalg.inv(C)
        B, A = level.method.B0.double(), level.method.A0.double()
        assert gap(expected, level.method.scale * B @ A) < 1e-4
        assert torch.equal(level.method.A, level.method.A0)


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_corda_with_inputs_of_identity_covariance_is_a_split_of_w_alone(mode: str) -> None:
    """PiSSA's with the largest, MiLoRA's with the smallest; and that is what it is without data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9))
    method = inlay.adapt(model, CorDA(r=2, alpha=3, mode=mode, damping=0.0), "0").levels[0].method
    before = numbers_of(method)
    inlay.calibrate(model, [12**0.5 * torch.eye(12)[torch.randperm(12)]])
    U, S, Vh = torch.linalg.svd(model[0].weight.detach().double(), full_matrices=False)
    part = slice(0, 2) if mode == "instruction" else slice(7, 9)
    assert gap((U[:, part] * S[part]) @ Vh[part], method.scale * method.B0.double() @ method.A0.double()) < 1e-5
    for name in ("A", "B", "A0", "B0"):
        torch.testing.assert_close(numbers_of(method)[name], before[name], atol=1e-5, rtol=1e-4)


def numbers_of(method: Method) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in method.stored().items()}


def test_lorasb_is_the_best_step_of_its_rank() -> None:
    model, batches = bert(), sentences()
    adapter = inlay.adapt(model, LoRASB(r=4, eta=1e-3))
    inlay.calibrate(model, batches)
    for level in adapter.levels[:-2]:
        method, G = level.method, gradient_of(bert(), level.site.path, batches)
        U, S, Vh = torch.linalg.svd(-1e-3 * G.sign().double())
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        assert gap(best, method.delta().dense()) < 1e-4
        for side in (method.B.T, method.A):
            torch.testing.assert_close(side @ side.T, torch.eye(4), atol=1e-5, rtol=0)
        assert [n for n, p in method.named_parameters() if p.requires_grad] == ["R"]
        assert torch.equal(method.R, method.R.diag().diag())


def test_the_gradient_of_lorasb_is_the_projected_gradient_of_w() -> None:
    """Nothing stands between: moving R by its gradient moves W by the nearest thing to W's own gradient."""
    model, batches = bert(), sentences(1)
    adapter = inlay.adapt(model, LoRASB(r=4), "block[1].mlp.up", head=None)
    inlay.calibrate(model, batches)
    method, path = adapter.levels[0].method, adapter.levels[0].site.path
    model(**batches[0]).loss.backward()
    moved = bert()
    with torch.no_grad():
        moved.get_submodule(path).weight += method.delta().dense()
    G = gradient_of(moved, path, batches)
    assert gap(method.B.T @ G @ method.A.T, method.R.grad) < 1e-4


@pytest.mark.parametrize("method", ALL[:3], ids=lambda m: m.label())
def test_the_start_is_the_base(method: Method) -> None:
    model, batches = bert(), sentences()
    with torch.no_grad():
        base = model(**batches[0]).logits
        inlay.adapt(model, method)
        inlay.calibrate(model, batches)
        assert torch.equal(base, model(**batches[0]).logits)


# ---------------------------------------------------------------------- methods made of them
@pytest.mark.parametrize("outer", [DoRA, DyLoRA, DeltaLoRA])
@pytest.mark.parametrize("inner", [EVA(r=3), CorDA(r=3), LoRASB(r=3)], ids=lambda m: m.label())
def test_methods_made_of_calibrated_ones(outer: type[Method], inner: Method) -> None:
    model, batches = bert(), sentences()
    adapter = inlay.adapt(model, outer(of=inner), ("attn.q", "mlp.down"))
    with torch.no_grad():
        base = model(**batches[0]).logits
    inlay.calibrate(model, batches)
    lone = bert()
    alone = inlay.adapt(lone, inner, ("attn.q", "mlp.down"))
    inlay.calibrate(lone, batches)
    for mine, theirs in zip(adapter.levels[:-2], alone.levels[:-2], strict=True):
        for n, t in theirs.method.stored().items():
            assert torch.equal(t, mine.method.of.stored()[n])
    with torch.no_grad():
        start = model(**batches[0]).logits
    assert gap(base, start) < (1e-2 if isinstance(inner, LoRASB) else 1e-6)
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for i in range(3):
        model(**batches[i]).loss.backward()
        optimizer.step()
        inlay.step(model, (i + 1) / 3, optimizer)
        optimizer.zero_grad()
    with torch.no_grad():
        assert model(**batches[0]).logits.isfinite().all()
    adapter.merge()


def test_relora_cannot_begin_such_a_method_anew() -> None:
    with pytest.raises(OptionError, match="begins its update anew, without the data that EVA starts from"):
        ReLoRA(of=EVA())


def test_several_methods_are_served_by_one_pass() -> None:
    model, batches, calls = bert(), sentences(), 0
    adapter = inlay.adapt(model, [EVA(r=2, tau=1.0).on("attn.q"), CorDA(r=2).on("attn.v"), LoRASB(r=2).on("mlp.up")])

    def counting(batches: Batches) -> Iterator[dict[str, Tensor]]:
        nonlocal calls
        for batch in batches:
            calls += 1
            yield batch

    told: list[tuple[int, int | None]] = []
    done = inlay.calibrate(model, counting(batches), progress=lambda n, of: told.append((n, of)))
    assert (calls, done.places, done.batches, done.samples) == (3, 6, 3, 90)
    assert told == [(1, None), (2, None), (3, None)]
    assert all(m.is_calibrated for lv in adapter.levels for m in lv.method.modules() if isinstance(m, Calibrated))
    inlay.calibrate(model, batches, progress=lambda n, of: told.append((n, of)))
    assert told[3:] == [(1, 3), (2, 3), (3, 3)]
    assert "6 places on 3 batches" in str(done)
