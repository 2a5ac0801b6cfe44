"""AdaLoRA's allocation against peft's, and what DyLoRA promises: one adapter that serves at every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.errors import AdapterError, OptionError, SiteError
from inlay.core.matrices import Dense
from inlay.methods import IA3, AdaLoRA, DeltaLoRA, DoRA, DyLoRA, LoRA, ReLoRA, VeRA
from inlay.methods.schedule.dylora import use_rank

STEPS = 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(32, 8), torch.randn(32, 8)


def test_adalora_allocates_as_peft_does() -> None:
    """The same tensors, gradients and masks, step by step, from the first budget to the last."""
    config = peft.AdaLoraConfig(init_r=4, target_r=2, tinit=2, tfinal=6, deltaT=1, total_step=STEPS, lora_alpha=4,
                                target_modules=["up", "down"])  # fmt: skip
    theirs = peft.get_peft_model(net(), config)
    model = net()
    adapter = inlay.adapt(model, AdaLoRA(r=4, target=2, alpha=4, start=2 / STEPS, end=6 / STEPS), ("up", "down"))
    mine = [level.method for level in adapter.levels]
    layers = [theirs.base_model.model.up, theirs.base_model.model.down]
    with torch.no_grad():
        for method, layer in zip(mine, layers, strict=True):
            for p, of in ((method.P, "lora_B"), (method.E, "lora_E"), (method.Q, "lora_A")):
                p.copy_(0.3 * torch.randn_like(p))
                q = getattr(layer, of)["default"]
                q.copy_(p.reshape(q.shape))
    x, y = data()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, theirs)]
    kept = []
    for step in range(1, STEPS + 1):
        for m, optimizer in zip((model, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (m(x) - y).square().mean().backward()
            optimizer.step()
        inlay.step(model, step / STEPS)
        theirs.base_model.update_and_allocate(step)
        for method, layer in zip(mine, layers, strict=True):
            torch.testing.assert_close(method.E, layer.lora_E["default"].flatten(), rtol=1e-4, atol=1e-6)
        kept.append(sum(int(method.E.ne(0).sum()) for method in mine))
    assert kept[0] == 8
    assert kept[-1] == 4
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)


def trained(method: AdaLoRA | DoRA) -> tuple[nn.Module, inlay.Adapter]:
    model = net()
    adapter = inlay.adapt(model, method, ("up", "down"))
    x, y = data()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        ((model(x) - y).square().mean() + inlay.penalty(model)).backward()
        optimizer.step()
        inlay.step(model, (step + 1) / STEPS)
    return model, adapter


def triplets(adapter: inlay.Adapter) -> int:
    return sum(m.r for level in adapter.levels for m in level.method.modules() if isinstance(m, AdaLoRA))


@pytest.mark.parametrize("wrap", [lambda method: method, lambda method: DoRA(of=method)], ids=["alone", "in DoRA"])
def test_a_file_holds_the_surviving_triplets_alone(wrap: Callable[[AdaLoRA], AdaLoRA | DoRA], tmp_path: Path) -> None:
    model, adapter = trained(wrap(AdaLoRA(r=4, target=2)))
    adapter.save(str(tmp_path))
    fresh = net()
    loaded = inlay.load(fresh, str(tmp_path))
    assert triplets(loaded) == 4 < triplets(adapter)
    x, _ = data()
    torch.testing.assert_close(fresh(x), model(x), rtol=1e-6, atol=1e-6)
    loaded.save(str(tmp_path / "again"))
    assert torch.equal(fresh(x), (inlay.load(again := net(), str(tmp_path / "again")), again(x))[1])


def test_adalora_wants_gradients() -> None:
    model = net()
    inlay.adapt(model, AdaLoRA(r=4, target=2), ("up",))
    with pytest.raises(AdapterError, match="before zero_grad"):
        inlay.step(model, 0.5)


def test_a_method_inside_another_is_stepped_too() -> None:
    model = net()
    inlay.adapt(model, DoRA(of=AdaLoRA(r=4, target=1, start=0, end=0.5)), ("up",))
    x, y = data()
    (model(x) - y).square().mean().backward()
    assert inlay.penalty(model).item() > 0
    inlay.step(model, 0.49)
    assert sum(model.inlay.levels("default")[0].method.of.kept) == 1


@pytest.mark.parametrize("of", [LoRA(r=4), VeRA(r=6)])
def test_dylora_at_every_rank(of: LoRA | VeRA) -> None:
    """At rank n the adapter is the leading n ranks of the whole, r/n times as strong."""
    model, base, x = net().eval(), net().up, data()[0]
    adapter = inlay.adapt(model, DyLoRA(of=of), ("up",))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    whole = adapter.levels[0].method.of.delta()
    for n in range(1, of.r + 1):
        use_rank(adapter, n)
        W = base.weight + of.r / n * whole.scale * whole.B[:, :n] @ whole.A[:n]
        torch.testing.assert_close(model.up(x), nn.functional.linear(x, W, base.bias), rtol=1e-4, atol=1e-4)
    with pytest.raises(OptionError, match="1 to"):
        use_rank(adapter, of.r + 1)


def test_dylora_trains_its_leading_ranks_to_serve_alone() -> None:
    """On a target of rank 4, the leading rank of DyLoRA fits better than the first of LoRA's trained together."""
    torch.manual_seed(0)
    x, W = torch.randn(256, 16), torch.randn(16, 4) @ torch.randn(4, 16) / 4

    def fit(method: LoRA | DyLoRA) -> list[float]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 16))
        base = copy.deepcopy(model[0])
        y = model(x).detach() + x @ W.T
        adapter = inlay.adapt(model, method, ("0",))
        optimizer = torch.optim.Adam(adapter.parameters(), lr=2e-2)
        for step in range(600):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
            inlay.step(model, (step + 1) / 600)
        built = adapter.levels[0].method
        delta = (built.of if isinstance(built, DyLoRA) else built).delta()
        found = []
        for n in (1, 2, 3, 4):
            factor = delta.scale * (4 / n if isinstance(built, DyLoRA) else 1.0)
            D = (factor * delta.B[:, :n] @ delta.A[:n]).detach()
            found.append((base(x) + x @ D.T - y).square().mean().item())
        return found

    nested, plain = fit(DyLoRA(of=LoRA(r=4, alpha=4))), fit(LoRA(r=4, alpha=4))
    assert nested[0] < plain[0]
    assert nested[1] < plain[1]
    assert plain[3] < 0.05


def test_dylora_needs_ranks() -> None:
    with pytest.raises(SiteError, match="needs an update B A"):
        inlay.adapt(net(), DyLoRA(of=Rankless()), ("up",))
    with pytest.raises(OptionError, match="give dropout to DyLoRA"):
        DyLoRA(of=LoRA(dropout=0.1))
    with pytest.raises(OptionError):
        DyLoRA(of=IA3())


def test_delta_lora_is_the_loop_that_moves_the_base() -> None:
    """The paper's algorithm, written out: W moves by λ s (B' A' − B A) after every step from the start on."""
    x, y = data()
    model, plain = net(), net()
    adapter = inlay.adapt(model, DeltaLoRA(of=LoRA(r=2, alpha=4), ratio=0.5, start=5 / STEPS), ("up",))
    inner = adapter.levels[0].method.of
    W = plain.up.weight.detach().clone()
    A, B = (p.detach().clone().requires_grad_() for p in (inner.A, inner.B))
    mine, theirs = torch.optim.Adam(adapter.parameters(), lr=1e-2), torch.optim.Adam([A, B], lr=1e-2)
    for step in range(1, STEPS + 1):
        mine.zero_grad()
        (model(x) - y).square().mean().backward()
        mine.step()
        inlay.step(model, step / STEPS)
        theirs.zero_grad()
        before = (B @ A).detach()
        plain.down(torch.tanh(nn.functional.linear(x, W + 2 * B @ A, plain.up.bias))).sub(y).square().mean().backward()
        theirs.step()
        if step > 5:
            W += 0.5 * 2 * ((B @ A).detach() - before)
        torch.testing.assert_close(inner.B, B, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.up.weight, W + 2 * B @ A, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.up._parameters["weight"], net().up.weight), "the base itself has not moved"


def restarted(method: ReLoRA, taken: int = 12) -> tuple[nn.Module, inlay.Adapter, torch.optim.Adam, list[Tensor]]:
    """So many steps of a run of twelve; W′ before and after each call of `inlay.step`."""
    model, (x, y) = net(), data()
    adapter = inlay.adapt(model, method, ("up",))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    weights = []
    for step in range(1, taken + 1):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        before = model.up.weight.detach().clone()
        inlay.step(model, step / 12, optimizer)
        weights += [before, model.up.weight.detach().clone()]
    return model, adapter, optimizer, weights


def test_relora_restarts_without_a_jump_and_gains_rank() -> None:
    model, adapter, _, weights = restarted(ReLoRA(of=LoRA(r=1), restarts=2, warmup=0))
    for cycle_end in (4, 8):  # the step at which a cycle ends moves nothing but what is trained
        torch.testing.assert_close(weights[2 * cycle_end - 2], weights[2 * cycle_end - 1], rtol=0, atol=1e-6)
    delta = model.up.weight - net().up.weight
    assert torch.linalg.matrix_rank(delta.detach(), rtol=1e-4) == 3
    method = adapter.levels[0].method
    assert int(method.cycle) == 2
    assert method.of.B.ne(0).any(), "training went on after the last restart"


@pytest.mark.parametrize("by", ["random", "magnitude"])
def test_relora_really_prunes_the_moments(by: str) -> None:
    """Of each moment the share that is asked for is zero after a restart; with magnitude the largest are left."""
    restart = 6
    full = restarted(ReLoRA(of=LoRA(r=4), restarts=1, prune=0.0), restart)
    pruned = restarted(ReLoRA(of=LoRA(r=4), restarts=1, prune=0.75, prune_by=by), restart)
    for name in "AB":
        states = [run[2].state[run[1].levels[0].method.of.get_parameter(name)] for run in (full, pruned)]
        for moment in ("exp_avg", "exp_avg_sq"):
            before, after = (state[moment].flatten() for state in states)
            assert before.ne(0).all()
            gone = after.eq(0)
            assert int(gone.sum()) == round(0.75 * gone.numel())
            assert torch.equal(after[~gone], before[~gone])
            assert by == "random" or before[gone].abs().max() <= before[~gone].abs().min()


def test_relora_wants_the_optimizer() -> None:
    model = net()
    inlay.adapt(model, ReLoRA(restarts=1), ("up",))
    with pytest.raises(AdapterError, match=r"give inlay\.step the optimizer"):
        inlay.step(model, 0.6)


def test_relora_warms_up_after_a_restart() -> None:
    """Right after a restart steps are shorter than without a warm-up, by the share that is said."""
    moves = {}
    for warmup in (0, 4):
        _, _, _, weights = restarted(ReLoRA(of=LoRA(r=2), restarts=1, warmup=warmup, prune=1.0))
        moves[warmup] = [(b - a).norm().item() for a, b in zip(weights[1::2], weights[3::2], strict=False)]
    assert moves[0][:5] == moves[4][:5], "before the restart all is the same"
    assert moves[4][5] < 0.3 * moves[0][5]


class Rankless(LoRA):
    """A method with a delta that is no product."""

    def delta(self) -> Dense:
        return Dense(super().delta().dense())
