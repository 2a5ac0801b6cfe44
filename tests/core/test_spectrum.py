"""Singular values and vectors: exact where small, randomised where the leading ones of a large matrix are wanted."""

from __future__ import annotations

import time

import pytest
import torch

import inlay
import inlay.models
from inlay.core.method import Method
from inlay.core.spectrum import SMALL, svd
from inlay.methods import SVFT, LoRAXS, PiSSA


def decaying(d_out: int, d_in: int) -> torch.Tensor:
    """A matrix whose singular values fall as those of trained weights do."""
    torch.manual_seed(0)
    n = min(d_out, d_in)
    U, V = (torch.linalg.qr(torch.randn(d, n)).Q for d in (d_out, d_in))
    return (U * torch.arange(1, n + 1) ** -0.5) @ V.T


def test_exact() -> None:
    W = decaying(40, 60)
    U, S, V = svd(W)
    torch.testing.assert_close((U * S) @ V.T, W, atol=1e-6, rtol=1e-5)
    assert bool((U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all())
    u, s, v = svd(W.to(torch.bfloat16), 5)
    assert (u.shape, s.shape, v.shape) == ((40, 5), (5,), (60, 5))
    assert u.dtype == torch.float32


def test_randomised_is_close_fast_and_repeatable() -> None:
    W = decaying(700, 900)
    assert min(W.shape) > SMALL
    start = time.perf_counter()
    exact = svd(W, 8, iterations=0)
    middle = time.perf_counter()
    quick = svd(W, 8)
    assert time.perf_counter() - middle < middle - start
    torch.testing.assert_close(quick[1], exact[1], rtol=1e-3, atol=0)
    best = (W - (exact[0] * exact[1]) @ exact[2].T).norm()
    assert float((W - (quick[0] * quick[1]) @ quick[2].T).norm()) <= 1.001 * float(best)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(quick, svd(W, 8), strict=True))


def test_nothing_is_drawn_from_the_ambient_generator() -> None:
    W = decaying(700, 600)
    state = torch.random.get_rng_state()
    svd(W, 4)
    assert torch.equal(state, torch.random.get_rng_state())


def test_without_storage() -> None:
    shapes = [t.shape for t in svd(torch.empty(700, 900, device="meta"), 8)]
    assert shapes == [(700, 8), (8,), (900, 8)]


@pytest.mark.slow  # a second model to open
@pytest.mark.parametrize(
    ("method", "where"),
    [(PiSSA(r=16), ["all-linear"]), (LoRAXS(r=16), ["all-linear"]), (SVFT(), ["attn.q", "attn.v"])],
    ids=["pissa", "loraxs", "svft"],
)
def test_smollm2_starts_from_its_spectra_in_seconds_and_alike(method: Method, where: list[str]) -> None:
    model = inlay.models.open("smollm2-135m-instruct", "causal-lm").model
    found = []
    for _ in range(2):
        start = time.process_time()
        inlay.adapt(model, method, where)
        assert time.process_time() - start < 30  # 2 to 4 on one core
        found.append({name: t.detach().clone() for name, t in model.inlay.state_dict().items() if t is not None})
        inlay.detach(model)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())
