"""Fast = reference: structured matrices against dense ones, the effective path against the factored one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import inlay
from inlay.core import levels, mount, paths, products
from inlay.core import matrices as m
from inlay.core.active import attached
from inlay.core.method import WeightMethod
from inlay.core.paths import prefers_effective
from inlay.methods import LoRA
from laws.benches import run
from laws.cases import Case, cases, stir
from laws.checks import close
from laws.refusals import refused

D = torch.float64
Made = tuple[m.Matrix, list[Tensor], Callable[..., Tensor]]
"""A structured matrix, the tensors it is made of, and the same matrix formed densely from them by hand."""


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=D, requires_grad=True)


def low_rank(d_out: int, d_in: int, r: int) -> Made:
    B, A = leaf(d_out, r), leaf(r, d_in)
    return m.LowRank(B, A, 0.7), [B, A], lambda B, A: 0.7 * torch.einsum("ir,rj->ij", B, A)


def dense(d_out: int, d_in: int, r: int) -> Made:
    W = leaf(d_out, d_in)
    return m.Dense(W), [W], lambda W: W * 1


def diagonal(d_out: int, d_in: int, r: int) -> Made:
    d = leaf(d_out)
    return m.Diagonal(d), [d], lambda d: torch.eye(len(d), dtype=D) * d


def kronecker(d_out: int, d_in: int, r: int) -> Made:
    P, Q = leaf(r, d_in), leaf(d_out, r)

    def formed(P: Tensor, Q: Tensor) -> Tensor:
        return torch.einsum("pq,mn->pmqn", P, Q).reshape(P.shape[0] * Q.shape[0], P.shape[1] * Q.shape[1])

    return products.Kronecker(P, Q), [P, Q], formed


def tap(d_out: int, d_in: int, r: int) -> Made:
    A = leaf(d_out, d_in)
    return (
        products.Tap(A, r - 1, r),
        [A],
        lambda A: torch.stack([A if t == r - 1 else 0 * A for t in range(r)], -1).flatten(1),
    )


def hadamard(d_out: int, d_in: int, r: int) -> Made:
    b1, a1, b2, a2 = leaf(d_out, r), leaf(r, d_in), leaf(d_out, r + 1), leaf(r + 1, d_in)
    made = products.Hadamard(m.LowRank(b1, a1, 2.0), m.LowRank(b2, a2))
    return made, [b1, a1, b2, a2], lambda b1, a1, b2, a2: 2 * (b1 @ a1) * (b2 @ a2)


def kronecker_low_rank(d_out: int, d_in: int, r: int) -> Made:
    P, B, A = leaf(r, d_in), leaf(d_out, 2), leaf(2, r)
    made = products.Kronecker(P, m.LowRank(B, A, 0.5))
    return made, [P, B, A], lambda P, B, A: 0.5 * torch.stack([torch.cat([p * (B @ A) for p in row], 1)
                                                              for row in P]).flatten(0, 1)  # fmt: skip


def khatri_rao(d_out: int, d_in: int, r: int) -> Made:
    U, V, width = leaf(d_out, r), leaf(d_out, d_in), max(1, d_in * r - 1)
    made = products.KhatriRao(U, V, width)
    return made, [U, V], lambda U, V: torch.stack([torch.kron(v, u)[:width] for u, v in zip(U, V, strict=True)])


def khatri_rao_transposed(d_out: int, d_in: int, r: int) -> Made:
    U, V, width = leaf(d_in, r), leaf(d_in, d_out), max(1, d_out * r - 1)
    made = products.KhatriRao(U, V, width, transposed=True)
    return made, [U, V], lambda U, V: torch.stack([torch.kron(v, u)[:width] for u, v in zip(U, V, strict=True)], 1)


def sandwich(d_out: int, d_in: int, r: int) -> Made:
    U, (M, tensors, formed), V = leaf(d_out, r), sparse(r, r, r), leaf(d_in, r)
    return products.Sandwich(U, M, V), [U, *tensors, V], lambda *t: t[0] @ formed(*t[1:-1]) @ t[-1].T


def block_diagonal_cut(d_out: int, d_in: int, r: int) -> Made:
    m_out, m_in = -(-d_out // r), -(-d_in // r)
    n = max(-(-d_out // m_out), -(-d_in // m_in))
    blocks = leaf(n, m_out, m_in)
    return m.BlockDiagonal(blocks, (d_out, d_in)), [blocks], lambda b: torch.block_diag(*b)[:d_out, :d_in]


def block_diagonal(d_out: int, d_in: int, r: int) -> Made:
    blocks = leaf(r, d_out, d_in)

    def formed(blocks: Tensor) -> Tensor:
        whole = blocks.new_zeros(r * d_out, r * d_in)
        for i in range(r):
            whole[i * d_out : (i + 1) * d_out, i * d_in : (i + 1) * d_in] = blocks[i]
        return whole

    return m.BlockDiagonal(blocks), [blocks], formed


def sparse(d_out: int, d_in: int, r: int) -> Made:
    k = min(r, d_out * d_in)
    at = torch.randperm(d_out * d_in)[:k]
    rows, cols, values = at // d_in, at % d_in, leaf(k)

    def formed(values: Tensor) -> Tensor:
        whole = values.new_zeros(d_out * d_in)
        whole[at] = values
        return whole.view(d_out, d_in)

    return m.Sparse(rows, cols, values, (d_out, d_in)), [values], formed


def summed(d_out: int, d_in: int, r: int) -> Made:
    (one, p, f), (two, q, g) = low_rank(d_out, d_in, r), dense(d_out, d_in, r)
    return one + two, [*p, *q], lambda *t: f(*t[:2]) + g(t[2])


def scaled(d_out: int, d_in: int, r: int) -> Made:
    (one, p, f), s = low_rank(d_out, d_in, r), leaf()
    return one.scaled(s), [*p, s], lambda *t: t[-1] * f(*t[:-1])


MAKERS = [
    low_rank, dense, diagonal, kronecker, kronecker_low_rank, hadamard, khatri_rao, khatri_rao_transposed, sandwich,
    tap, block_diagonal, block_diagonal_cut, sparse, summed, scaled,
]  # fmt: skip
size = st.integers(1, 5)


def test_every_matrix_has_a_maker() -> None:
    made = {type(make(2, 2, 2)[0]) for make in MAKERS}
    kinds = [c for module in (m, products) for c in vars(module).values() if isinstance(c, type)]
    assert made == {c for c in kinds if issubclass(c, m.Matrix) and not inspect.isabstract(c)}


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(d_out=size, d_in=size, r=size, lead=st.sampled_from([(), (3,), (2, 3), (0,)]))
def test_matrix(make: Any, d_out: int, d_in: int, r: int, lead: tuple[int, ...]) -> None:
    """Every operation and its gradients, from tensors and into them, against the matrix formed by hand."""
    torch.manual_seed(d_out * 100 + d_in * 10 + r)
    M, factors, formed = make(d_out, d_in, r)
    rows, cols = M.shape
    x, y, W = (torch.randn(*s, dtype=D, requires_grad=True) for s in ((*lead, cols), (*lead, rows), (rows, cols)))
    ids = torch.randint(cols, lead)
    full = formed(*factors)
    assert full.shape == M.shape
    pairs = {
        "dense": (M.dense(), full),
        "apply": (M.apply(x), F.linear(x, full)),
        "add_to": (M.add_to(y, x), y + F.linear(x, full)),
        "columns": (M.columns(ids), full.T[ids]),
        "row_dot": (M.row_dot(W), (W * full).sum(1)),
        "row_squares": (M.row_squares(), full.square().sum(1)),
        "squared_row_norms": (M.squared_row_norms(W, W.square().sum(1)), (W + full).square().sum(1)),
        "scaled": (M.scaled(0.5).dense(), 0.5 * full),
        "sum": ((M + m.Dense(W)).apply(x), F.linear(x, full + W)),
    }
    for name, (fast, plain) in pairs.items():
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")
        weights = torch.randn_like(plain)
        leaves = [*factors, x, y, W]
        got, want = (torch.autograd.grad((t * weights).sum(), leaves, retain_graph=True, allow_unused=True)
                     for t in (fast, plain))  # fmt: skip
        for g, w in zip(got, want, strict=True):
            zero = torch.zeros((), dtype=D)
            torch.testing.assert_close(
                zero if g is None else g, zero if w is None else w, rtol=1e-10, atol=1e-12, check_stride=False,
                msg=lambda text, n=name: f"gradient of {n}: {text}",
            ) if (g is None) == (w is None) else _zero(g, w)  # fmt: skip


def _zero(*grads: Tensor | None) -> None:
    assert all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_costs_are_counted(make: Any) -> None:
    """Costs grow with tokens, and the dense form is never said to cost less than nothing."""
    M, _, _ = make(4, 4, 2)
    assert 0 < M.flops(1) < M.flops(10)
    assert M.dense_flops() >= 0


# ---------------------------------------------------------------------- paths of whole layers
BENCHES = ("linear", "conv2d", "conv1d-point", "gpt2-qv", "timm")
PATHS = [c for c in cases() if isinstance(c.method, WeightMethod) and c.bench.name in BENCHES and refused(c) is None]


def asked_anew(model: torch.nn.Module) -> None:
    """Paths are chosen again, by whatever chooses now."""
    for one in attached(model).state.mounts.values():
        one.answers.clear()


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in PATHS])
def test_paths_agree(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factored, effective and lean paths of every matrix method: outputs, gradients of tensors and of inputs."""
    model, inputs = case.model(), case.feed()
    adapter = case.attach(model)
    stir(adapter)
    floating = {k: v.requires_grad_() for k, v in inputs.items() if v.is_floating_point()}
    leaves = [*adapter.parameters(), *floating.values()]
    found = {}
    choices = any(map(levels.acts_on_output, adapter.levels))
    for effective in (False, True):
        formed: list[bool] = []
        if not choices:  # the module always reads W′: the other path is the one quantised layers take
            monkeypatch.setattr(levels, "reads_formed", lambda level, choice=effective: choice)
            formed.append(effective)

        def choose(levels: Any, x: Tensor, choice: bool = effective, seen: list[bool] = formed) -> bool:
            seen.append(choice)
            return choice

        with monkeypatch.context() as patch:
            patch.setattr(mount, "lean_step", lambda *given: None)
            patch.setattr(mount, "prefers_effective", choose)
            asked_anew(model)
            y = run(model, inputs)
        found[str(effective)] = (y, torch.autograd.grad(y.sin().sum(), leaves))  # no norm, which rotations keep
        assert formed, "no path was chosen: the test tests nothing"
    with monkeypatch.context() as patch:
        patch.setattr(paths, "pays", lambda form, tokens: True)
        asked_anew(model)
        y = run(model, inputs)
        found["lean"] = (y, torch.autograd.grad(y.sin().sum(), leaves))
    for path in ("True", "lean"):
        close(found["False"][0], found[path][0], 1e-5, f"outputs of the two paths ({path})")
        for factored, other in zip(found["False"][1], found[path][1], strict=True):
            close(factored, other, 2e-5, f"gradients of the two paths ({path})")


def test_the_cheaper_path_is_taken() -> None:
    """In training a low rank stays factored and a nearly full rank becomes W′; at inference many tokens favour W′."""
    training = ((1, 1, False), (1, 4096, False), (64, 4096, True), (64, 1, False))
    inference = ((1, 1, False), (1, 4096, True), (64, 4096, True), (64, 1, False))
    for grad, table in ((True, training), (False, inference)):
        for rank, tokens, effective in table:
            adapter = inlay.adapt(torch.nn.Sequential(torch.nn.Linear(64, 64)), LoRA(r=rank), "0")
            levels = [(level.method, level.site) for level in adapter.levels]
            with torch.set_grad_enabled(grad):
                assert prefers_effective(levels, torch.randn(tokens, 64)) is effective, (grad, rank, tokens)
