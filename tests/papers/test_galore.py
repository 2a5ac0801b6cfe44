"""GaLore against its algorithm written out, against AdamW, and what its optimizer keeps in memory."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
import inlay.models
from inlay.core.errors import AdapterError, OptionError
from inlay.methods import BitFit, Full, GaLore, LoRA
from inlay.optim import AdamW
from inlay.optim.subspace import basis
from inlay.plan import plan
from inlay.train.measure import Watch, step_memory, storages

STEPS = 25


class Net(nn.Module):
    """A tall, a wide and a square matrix, all with biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.same, self.down = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.same(torch.tanh(self.up(x)))))


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(64, 12), torch.randn(64, 8)


def attached(methods: Any, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, inlay.Adapter]:
    model = Net().to(dtype)
    return model, inlay.adapt(model, methods, ("up", "same", "down"), dtype=dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> list[float]:
    x, y = (t.to(next(model.parameters()).dtype) for t in data())
    losses = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def copies(adapter: inlay.Adapter) -> dict[str, nn.Parameter]:
    """Trained copies by the base tensor's name."""
    return {level.site.key: level.method.value for level in adapter.levels}


# ---------------------------------------------------------------------- the equation
@pytest.mark.parametrize(("r", "every"), [(3, 4), (1, 1), (7, 100)])
def test_the_algorithm_written_out(r: int, every: int) -> None:
    """Algorithm 2 of the paper with exact singular vectors, step by step over several projections."""
    rate, decay, scale = 0.02, 0.1, 0.5
    model, adapter = attached(GaLore(r=r, every=every, scale=scale), torch.float64)
    mine = copies(adapter)
    theirs = {name: W.detach().clone() for name, W in mine.items()}
    state: dict[str, Any] = {}
    optimizer = inlay.optimizer(adapter, rate, weight_decay=decay)
    x, y = (t.double() for t in data())
    for t in range(1, STEPS + 1):
        (model(x) - y).square().mean().backward()
        for name, W in theirs.items():
            G = mine[name].grad.clone()
            m, n = G.shape
            if (t - 1) % every == 0:
                U, _, Vh = torch.linalg.svd(G, full_matrices=False)
                signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # which the paper leaves open
                P = (Vh * signs.T)[:r].T if m >= n else (U * signs)[:, :r]
                M, V = state[name][1:] if t > 1 else (0.0, 0.0)
                state[name] = (P, M, V)
            P, M, V = state[name]
            R = G @ P if m >= n else P.T @ G
            M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
            state[name] = (P, M, V)
            N = (M / (1 - 0.9**t)) / ((V / (1 - 0.999**t)).sqrt() + 1e-8)
            theirs[name] = (1 - rate * decay) * W - rate * scale * (N @ P.T if m >= n else P @ N)
        optimizer.step()
        optimizer.zero_grad()
        for name, W in theirs.items():
            torch.testing.assert_close(mine[name].data, W, rtol=1e-7, atol=1e-9, msg=lambda s, n=name: f"{n}: {s}")


def test_at_full_rank_it_is_adamw_bit_for_bit() -> None:
    """The catalogue's check: r = min(m, n) reproduces Adam."""
    model, adapter = attached(GaLore(r=20, scale=1.0))
    train(model, inlay.optimizer(adapter, 0.01, weight_decay=0.1))
    plain, other = attached(GaLore(r=20))
    train(plain, torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1, fused=True))
    wanted = copies(other)
    assert all(torch.equal(W, wanted[name]) for name, W in copies(adapter).items())


def test_scale_is_a_factor_on_the_step_and_not_on_the_decay() -> None:
    moved = {}
    for rate, scale in ((0.01, 0.25), (0.0025, 1.0)):
        model, adapter = attached(GaLore(r=20, scale=scale))
        train(model, inlay.optimizer(adapter, rate, weight_decay=0.1 * 0.01 / rate))
        moved[scale] = copies(adapter)
    for name, W in moved[0.25].items():
        torch.testing.assert_close(W, moved[1.0][name], rtol=1e-5, atol=1e-7)


def test_every_step_stays_in_the_subspace() -> None:
    """Between two projections W moves within r directions of its shorter side; after one, within r more."""
    model, adapter = attached(GaLore(r=2, every=5), torch.float64)
    start = {name: W.detach().clone() for name, W in copies(adapter).items()}
    optimizer = inlay.optimizer(adapter, 0.01)
    for steps, rank in ((5, 2), (5, 4)):
        train(model, optimizer, steps)
        for name, W in copies(adapter).items():
            assert torch.linalg.matrix_rank(W.detach() - start[name], rtol=1e-9) == rank, name


def test_it_learns() -> None:
    model, adapter = attached([GaLore(r=4, every=10), BitFit()])
    losses = train(model, inlay.optimizer(adapter, 0.05), 200)
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------------- with other methods
def test_beside_bitfit_biases_get_plain_adamw() -> None:
    _, adapter = attached([GaLore(r=3), BitFit()])
    optimizer = inlay.optimizer(adapter)
    by_rank = {g["rank"]: [p.dim() for p in g["params"]] for g in optimizer.param_groups}
    assert by_rank == {3: [2, 2, 2], None: [1, 1, 1]}
    rates = {g["rank"]: g["lr"] for g in optimizer.param_groups}
    assert rates == {3: GaLore.learning_rate, None: BitFit.learning_rate}


def test_without_projections_it_is_torchs_adamw() -> None:
    for method in (LoRA(r=2), Full()):
        runs = []
        for mine in (True, False):
            model, adapter = attached(method)
            groups = [{"params": [p], "weight_decay": 0.1 * (p.dim() > 1)} for p in adapter.parameters()]
            other = torch.optim.AdamW(groups, lr=0.01, fused=True)
            train(model, inlay.optimizer(adapter, 0.01, weight_decay=0.1) if mine else other)
            runs.append([p.detach() for p in adapter.parameters()])
        assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


# ---------------------------------------------------------------------- memory
def numbers(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.numel() for state in optimizer.state.values() for key, t in state.items() if key != "step")


def test_the_state_has_the_numbers_of_the_closed_form() -> None:
    """2 r·max(m, n) + r·min(m, n) for each matrix, where AdamW keeps 2mn."""
    model, adapter = attached(GaLore(r=3))
    optimizer = inlay.optimizer(adapter)
    train(model, optimizer, 1)
    wanted = sum(3 * (2 * max(m, n) + min(m, n)) for m, n in ((20, 12), (20, 20), (8, 20)))
    assert numbers(optimizer) == wanted
    assert optimizer.state_bytes() == 4 * wanted
    model, adapter = attached(Full())
    whole = inlay.optimizer(adapter)
    train(model, whole, 1)
    assert numbers(whole) == 2 * sum(p.numel() for p in adapter.parameters()) == whole.state_bytes() // 4


def test_kernels_and_stacks_of_matrices() -> None:
    """A kernel (c_out, c_in, k, k) counts as (c_out, c_in·k²), an expert stack as its matrices, each projected."""
    from laws.benches import benches
    from laws.cases import model_of

    conv = nn.Sequential(nn.Conv2d(6, 10, 3))
    adapter = inlay.adapt(conv, GaLore(r=2), ("0",))
    optimizer = inlay.optimizer(adapter)
    conv(torch.randn(2, 6, 5, 5)).square().sum().backward()
    optimizer.step()
    assert numbers(optimizer) == 2 * (2 * 54 + 10) == optimizer.state_bytes() // 4
    bench = benches()["mixtral"]
    model = model_of(bench)
    adapter = inlay.adapt(model, GaLore(r=2))
    optimizer = inlay.optimizer(adapter)
    stacks = [p for p in adapter.parameters() if p.dim() == 3]
    assert stacks
    from laws.benches import run

    run(model, bench.feed()).square().sum().backward()
    gradients = [p.grad.clone() for p in stacks]
    optimizer.step()
    for p, G in zip(stacks, gradients, strict=True):
        e, m, n = p.shape
        P = optimizer.state[p]["basis"]
        assert P.shape == (e, 2, min(m, n))
        assert optimizer.state[p]["exp_avg"].numel() == e * 2 * max(m, n)
        for i in range(e):
            torch.testing.assert_close(P[i], basis(G[i], 2))


def test_a_new_projection_needs_scratch_for_one_matrix_alone() -> None:
    """Eight matrices are projected with a peak that is that of one, and bases are the same every time."""
    peaks = {}
    for count in (1, 8):
        weights = [
            nn.Parameter(torch.randn(400, 300, generator=torch.Generator().manual_seed(i))) for i in range(count)
        ]
        optimizer = AdamW([{"params": weights, "rank": 4}], lr=0.01)
        for _ in range(2):
            for W in weights:
                W.grad = torch.ones_like(W).addcmul_(W, W)
            watch = Watch(storages([*weights, *(W.grad for W in weights)]))
            with watch:
                optimizer.step()
            optimizer.param_groups[0]["every"] = 1  # the second step projects anew, and keeps no more state
        peaks[count] = watch.peak
        again = [basis(W.grad, 4) for W in weights]
        assert all(torch.equal(P, basis(W.grad, 4)) for P, W in zip(again, weights, strict=True))
    state = 4 * (4 * (2 * 400 + 300) + 1)
    assert peaks[8] - peaks[1] <= 7 * state
    assert peaks[1] < 6 * 400 * 300 * 4


def test_memory_of_minilm() -> None:
    """Real shapes: the matrices of MiniLM's six blocks, rank 8 (the figures are in the method's page)."""
    model = inlay.models.open("minilm", "text-classification", num_labels=6).model
    found = {}
    for method in (GaLore(r=8), GaLore(r=128), GaLore(r=384)):
        adapter = inlay.adapt(model, method, head=None)
        found[method.r] = inlay.optimizer(adapter).state_bytes()
        adapter.delete()
    matrices = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert found[384] == 2 * 4 * matrices == 84_934_656
    assert found[8] == 6 * 4 * 8 * (4 * 3 * 384 + 2 * (2 * 1536 + 384)) == 2_211_840
    assert found[128] == 16 * found[8]


def test_the_plan_tells_them_apart() -> None:
    """On shapes alone: the state of rank 8 against AdamW's, and one gradient instead of all."""
    peaks = [
        plan("roberta-base", method, batch=1, length=8, head=None).peak_training_bytes
        for method in (GaLore(r=768), GaLore(r=8), GaLore(r=8, per_layer=True))
    ]
    assert all(peaks)
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    low = 12 * 8 * (4 * 3 * 768 + 2 * (2 * 3072 + 768))
    assert peaks[0] - peaks[1] == pytest.approx(4 * (2 * matrices - low), rel=0.05)
    assert peaks[1] - peaks[2] == pytest.approx(4 * matrices, rel=0.1)


# ---------------------------------------------------------------------- per layer
def test_steps_within_the_backward_pass_are_the_same() -> None:
    runs = {}
    for early in (False, True):
        model, adapter = attached([GaLore(r=3, every=4, per_layer=early), BitFit()])
        train(model, inlay.optimizer(adapter, 0.02, weight_decay=0.1))
        runs[early] = [p.detach() for p in adapter.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(runs[False], runs[True], strict=True))


def test_no_two_gradients_of_matrices_live_at_once() -> None:
    model, adapter = attached(GaLore(r=3, per_layer=True))
    optimizer = inlay.optimizer(adapter)
    seen: list[int] = []
    for p in adapter.parameters():
        p.register_post_accumulate_grad_hook(
            lambda p: seen.append(sum(q.grad is not None for q in adapter.parameters()))
        )
    train(model, optimizer, 2)
    assert seen == [0] * 6, "the optimizer's hook comes first"


def test_the_peak_of_a_step_holds_one_gradient() -> None:
    """Eight matrices whose gradients outweigh the activations: AdamW, GaLore, GaLore per layer."""
    peaks = []
    for method in (Full(), GaLore(r=2), GaLore(r=2, per_layer=True)):
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
        adapter = inlay.adapt(model, method, ("re:.*",))
        x = torch.randn(2, 64)
        peaks.append(step_memory(lambda x=x, m=model: m(x).sum(), model, {"x": x}, inlay.optimizer(adapter))[1])
    matrix, low = 4 * 64 * 64, 4 * 2 * 3 * 64
    assert peaks[0] - peaks[1] == 8 * (2 * matrix - low)
    assert 6 * matrix < peaks[1] - peaks[2] <= 7 * matrix


def test_accumulation_is_refused_where_it_happens() -> None:
    model, adapter = attached(GaLore(r=3, per_layer=True))
    optimizer = inlay.optimizer(adapter)
    x, y = data()
    (model(x) - y).square().mean().backward()
    with pytest.raises(AdapterError, match="cannot be accumulated"):
        (model(x) - y).square().mean().backward()
    del optimizer
    (model(x) - y).square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters()), "an optimizer that is gone steps nothing"


# ---------------------------------------------------------------------- interrupted
@pytest.mark.parametrize("early", [False, True])
def test_its_state_dict_is_torchs(early: bool) -> None:
    """Saved without a pickle of ours, loaded with `weights_only`, training goes on with the same bits."""
    method = [GaLore(r=3, every=4, per_layer=early), BitFit()]
    model, adapter = attached(method)
    optimizer = inlay.optimizer(adapter, 0.02)
    train(model, optimizer, 6)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 7)

    again, other = attached(method)
    resumed = inlay.optimizer(other, 0.02)
    train(again, resumed, 1)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 7)
    assert all(torch.equal(p, q) for p, q in zip(adapter.parameters(), other.parameters(), strict=True))


def test_options() -> None:
    with pytest.raises(OptionError):
        GaLore(r=0)
    with pytest.raises(OptionError):
        GaLore(scale=0.0)
