"""BatchNorm's running statistics: the base's never move; `NormTuning(statistics="adapted")` keeps its own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.errors import CheckpointError, OptionError
from inlay.core.method import REGISTRY, Method, method_from
from inlay.methods import LoRA, NormTuning
from inlay.train.state import load_into, snapshot

ADAPTED = 'normtuning(statistics="adapted")'
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Net(nn.Module):
    """Convolution, BatchNorm, convolution, BatchNorm without affine parameters, linear layer."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options)
        self.last, self.plain = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5, affine=False)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).relu()
        return self.out(self.plain(self.last(h)).mean((2, 3)))


def net(**options: object) -> Net:
    torch.manual_seed(1)
    model = Net(**options)
    with torch.no_grad():
        for t in (model.norm.running_mean, model.plain.running_mean, model.norm.weight, model.norm.bias):
            t += torch.randn_like(t)
        model.norm.running_var *= 3
        model.norm.num_batches_tracked += 7
    return model


X = torch.randn(6, 3, 7, 7, generator=torch.Generator().manual_seed(2)) * 2 + 1


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if not name.startswith("inlay.")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(model: nn.Module, count: int = 3) -> None:
    """Plain training in train mode, as any user's loop does it."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for i in range(count):
        (model(X + i) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def reference(count: int = 3, **options: object) -> Net:
    """The same training of γ and β by torch alone, with statistics that move at that one layer."""
    model = net(**options).requires_grad_(False)
    model.norm.requires_grad_(True)
    model.train()
    model.plain.eval()
    optimizer = torch.optim.SGD(model.norm.parameters(), lr=0.05)
    for i in range(count):
        (model(X + i) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


WEIGHT = sorted(name for name, cls in REGISTRY.items() if cls.kind == "weight" and not (cls.needs or cls.architecture))
PLACES = {"bitfit": ["norm", "conv", "out"], "full": ["norm", "conv"], "normtuning": ["norm"]}


@pytest.mark.parametrize("spec", [*WEIGHT, "houlsby", ADAPTED])
def test_training_with_any_method_leaves_the_statistics_of_the_base(spec: str) -> None:
    method: Method = method_from({"boft": "boft(factors=1)"}.get(spec, spec))  # one factor fits any width
    model = net()
    before = state(model)
    inlay.adapt(model, method, PLACES.get(type(method).name(), ["out"]), head=None)
    steps(model)
    assert same(state(model), before)
    inlay.detach(model)
    assert same(state(model), before)
    model.train()
    model(X)  # the plain model follows its batches again
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])


def test_frozen_normalises_with_the_statistics_of_the_base_in_training() -> None:
    model = net().eval()
    expected = model(X)
    inlay.adapt(model, NormTuning(), head=None)
    model.train()
    assert torch.equal(model(X), expected)
    assert {name.rpartition(".")[2] for name in model.inlay.state_dict()} == {"value"}


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.4}], ids=str)
def test_adapted_equals_torch_that_trains_the_layer(options: dict[str, object]) -> None:
    model, expected = net(**options), reference(**options)
    before = state(model)
    adapter = inlay.adapt(model, method_from(ADAPTED), head=None)
    assert adapter.adapter_parameters == 8  # statistics are not trained
    model.eval()
    assert torch.equal(model(X), net(**options).eval()(X)), "the base at the start"
    steps(model)
    torch.testing.assert_close(model(X), expected(X))
    assert same(state(model), before)
    own = model.inlay.adapters["default"]["norm/weight"]
    for name in STATISTICS:
        torch.testing.assert_close(getattr(own, name), getattr(expected.norm, name))
    with inlay.disabled(model):
        assert torch.equal(model(X), net(**options).eval()(X))
        model.train()
        assert torch.equal(model(X), net(**options).eval()(X)), "the base holds still where its adapter is off"


def test_round_trip(tmp_path: Path) -> None:
    model = net()
    adapter = inlay.adapt(model, method_from(ADAPTED), head=None)
    steps(model)
    adapter.save(str(tmp_path))
    again = net().eval()
    inlay.load(again, tmp_path)
    assert torch.equal(again(X), model(X))
    steps(model, 2)
    steps(again, 2)  # training goes on from the saved statistics
    assert torch.equal(again(X), model(X))
    assert same(state(again), state(net()))


def test_a_run_that_goes_on_finds_its_statistics() -> None:
    """What `inlay train` writes into checkpoints and keeps of the best adapter holds them."""
    model = net()
    inlay.adapt(model, method_from(ADAPTED), head=None)
    own = model.inlay.adapters["default"]
    steps(model)
    then, kept = model(X), snapshot(own)
    steps(model)
    assert not torch.allclose(model(X), then)
    load_into(own, kept)
    assert torch.equal(model(X), then)


def test_a_base_without_running_statistics_is_refused(tmp_path: Path) -> None:
    adapter = inlay.adapt(net(), method_from(ADAPTED), head=None)
    adapter.save(str(tmp_path))
    with pytest.raises(CheckpointError, match="running_mean"):
        inlay.load(net_without(), tmp_path)


def net_without() -> Net:
    model = net()
    for name in STATISTICS:
        model.norm._buffers[name] = None
    return model


def test_merge_writes_the_statistics_into_the_base_and_unmerge_restores_them() -> None:
    model = net()
    kept = {name: model.norm._buffers[name] for name in STATISTICS}
    before = state(model)
    adapter = inlay.adapt(model, method_from(ADAPTED), head=None)
    steps(model)
    adapted = model(X)
    adapter.merge()
    torch.testing.assert_close(model(X), adapted, rtol=1e-6, atol=1e-6)
    merged = state(model)
    assert not torch.equal(merged["norm.running_mean"], before["norm.running_mean"])
    model.train()
    model(X)
    assert same(state(model), merged), "merged statistics hold still as well"
    model.eval()
    plain = Net().eval()
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(X), adapted, rtol=1e-6, atol=1e-6)
    adapter.unmerge()
    assert torch.equal(model(X), adapted)
    assert same(state(model), before)
    inlay.detach(model)
    assert all(model.norm._buffers[name] is t for name, t in kept.items())
    assert type(model.norm) is nn.BatchNorm2d


def test_detach_with_merged_statistics_leaves_an_ordinary_model() -> None:
    model = net()
    adapter = inlay.adapt(model, method_from(ADAPTED), head=None)
    steps(model)
    adapted = model(X)
    adapter.merge()
    inlay.detach(model, keep_merged=True)
    torch.testing.assert_close(model(X), adapted, rtol=1e-6, atol=1e-6)
    assert state(model).keys() == state(net()).keys()


def test_each_adapter_has_statistics_of_its_own() -> None:
    model = net()
    inlay.adapt(model, method_from(ADAPTED), name="a", head=None)
    steps(model)
    first = model(X)
    inlay.adapt(model, method_from(ADAPTED), name="b", head=None)
    inlay.adapt(model, LoRA(r=2), ["out"], name="c", head=None)
    inlay.use(model, "b")
    steps(model, 5)
    second = model(X)
    inlay.use(model, "c")
    model.train()
    assert torch.equal(model(X), net().eval()(X)), "LoRA alone: the statistics of the base"
    model.eval()
    inlay.use(model, "a")
    assert torch.equal(model(X), first)
    assert not torch.allclose(first, second)
    with inlay.route(model, ["a", "b", None, "b", "a", None]):
        mixed = model(X)
    base = net().eval()(X)
    expected = torch.stack([first[0], second[1], base[2], second[3], first[4], base[5]])
    torch.testing.assert_close(mixed, expected)


def test_the_mode_is_that_of_the_adapter() -> None:
    """`inlay train` keeps the base in evaluation mode where its dropout is off; the adapter trains all the same."""
    model = net().eval()
    inlay.adapt(model, method_from(ADAPTED), head=None)
    model.inlay.train()
    model(X)
    own = model.inlay.adapters["default"]["norm/weight"]
    assert int(own.num_batches_tracked) == 8
    model.train()
    model.inlay.eval()
    model(X)
    assert int(own.num_batches_tracked) == 8


def test_a_deep_copy_has_statistics_of_its_own() -> None:
    model = net()
    inlay.adapt(model, method_from(ADAPTED), head=None)
    twin = copy.deepcopy(model)
    steps(twin)
    own = model.inlay.adapters["default"]["norm/weight"]
    assert torch.equal(own.running_mean, model.norm._buffers["running_mean"])
    assert not torch.equal(twin.inlay.adapters["default"]["norm/weight"].running_mean, own.running_mean)


def test_compiled() -> None:
    plain, compiled = net(), net()
    for model in (plain, compiled):
        inlay.adapt(model, method_from(ADAPTED), head=None)
        model.train()
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(run(X), plain(X))
    own, other = (m.inlay.adapters["default"]["norm/weight"] for m in (plain, compiled))
    for name in STATISTICS:
        torch.testing.assert_close(getattr(own, name), getattr(other, name))


def test_an_unknown_choice_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"frozen.*adapted"):
        NormTuning(statistics="moving")  # type: ignore[arg-type]
