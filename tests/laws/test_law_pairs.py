"""Law 10: every ordered pair of methods at one site composes, merged as in the forward pass, or is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

import inlay
from inlay.core.errors import ComposeError, MergeError, SiteError
from inlay.core.method import REGISTRY, Method, ParameterMethod, WeightMethod, method_class, method_from
from laws.benches import benches
from laws.cases import SETTINGS, model_of, places, stir
from laws.checks import close, gap, output

method_class("lora")
NAMES = [name for name in REGISTRY if REGISTRY[name].has_sites]
BENCHES = ("linear", "gpt2-qv", "mha", "bert")


def first(name: str) -> Method:
    return method_from(SETTINGS.get(name, [name])[0])


def pair(below: str, above: str, bench_name: str) -> str:
    """What became of a pair: `refused`, `merged` or `forward`; AssertionError where it is wrong."""
    bench = benches()[bench_name]
    spots = [places(first(name), bench) for name in (below, above)]
    if None in spots:
        return "no place"
    plan = [first(n).on(*spot) if spot else first(n) for n, spot in zip((below, above), spots, strict=True)]
    model, inputs = model_of(bench), bench.feed()
    try:
        adapter = inlay.adapt(model, plan)
    except (ComposeError, SiteError):
        assert "inlay" not in model._modules, "a refused pair left something behind"
        return "refused"
    stir(adapter)
    both, base = output(model, inputs), output(model_of(bench).requires_grad_(False), inputs)
    check_each_counts(adapter, both, inputs)
    if all(first(name).mergeable for name in (below, above)):
        adapter.merge()
        close(both, output(model, inputs), 2e-5, "merged against adapted")
        adapter.unmerge()
    else:
        with pytest.raises(MergeError, match="cannot be merged"):
            adapter.merge()
    assert torch.equal(both, output(model, inputs))
    inlay.detach(model)
    assert torch.equal(base, output(model.requires_grad_(False), inputs))
    return "merged" if all(first(name).mergeable for name in (below, above)) else "forward"


def check_each_counts(adapter: inlay.Adapter, both: torch.Tensor, inputs: dict) -> None:
    """Moving the tensors of either method changes the output: none is shadowed by the other."""
    for kind in {type(level.method) for level in adapter.levels}:
        own = [p for level in adapter.levels if type(level.method) is kind for p in level.method.parameters()]
        kept = [p.detach().clone() for p in own]
        with torch.no_grad():
            for p in own:
                p.mul_(1.5).add_(0.1)
            assert gap(both, output(adapter.model, inputs)) > 1e-6, f"{kind.__name__} is without effect"
            for p, old in zip(own, kept, strict=True):
                p.copy_(old)


DIAGONAL = [(a, NAMES[(i + shift) % len(NAMES)]) for shift in (0, 1, 5) for i, a in enumerate(NAMES)]


@pytest.mark.parametrize(("below", "above"), DIAGONAL)
def test_pairs_sampled(below: str, above: str) -> None:
    assert {pair(below, above, bench) for bench in ("linear", "bert")} <= {"refused", "merged", "forward", "no place"}


@pytest.mark.slow
@pytest.mark.parametrize("bench", BENCHES)
@pytest.mark.parametrize(("below", "above"), list(itertools.product(NAMES, NAMES)))
def test_pairs_all(below: str, above: str, bench: str) -> None:
    pair(below, above, bench)


def test_what_must_compose_and_what_must_not() -> None:
    """The refusals that the contract names, and no others among the matrix methods on plain linear layers."""
    refused = {
        (a, b)
        for a, b in itertools.product(NAMES, NAMES)
        if issubclass(REGISTRY[a], WeightMethod | ParameterMethod)
        and issubclass(REGISTRY[b], WeightMethod | ParameterMethod)
        and pair(a, b, "linear") == "refused"
    }
    copies = [n for n in NAMES if issubclass(REGISTRY[n], ParameterMethod) and not REGISTRY[n].needs]
    readers = [n for n in NAMES if issubclass(REGISTRY[n], WeightMethod) and REGISTRY[n].reads_weight]
    matrices = [n for n in NAMES if issubclass(REGISTRY[n], WeightMethod) and not REGISTRY[n].architecture]
    expected = set(itertools.product(copies, copies))
    for vectors in ("bitfit", "normtuning"):  # GaLore takes matrices
        expected -= {("galore", vectors), (vectors, "galore")}
    expected |= {(a, b) for a in (*matrices, "full", "galore", "bitfit") for b in readers}  # a reader of W comes first
    expected |= {(a, b) for a in readers for b in ("full", "galore")}  # and keeps the W it has read
    assert refused == expected, (refused - expected, expected - refused)


@pytest.mark.parametrize("above", ["lora", "ia3", "full", "bitfit"])
def test_stacked_adapters_follow_the_same_rules(above: str) -> None:
    """What one adapter may not hold in an order, two adapters may not be stacked to, nor merged to."""
    bench = benches()["linear"]
    model = model_of(bench)
    for name, method in (("d", first("dora")), ("x", first(above))):
        where = places(method, bench)
        stir(inlay.adapt(model, method, where, name=name))
    inlay.use(model, "x")
    with pytest.raises(ComposeError, match="come first"):
        inlay.use(model, "x", "d")
    assert model.inlay.active == ["x"], "a refused switch moved something"
    with pytest.raises(ComposeError, match="come first"):
        inlay.merge(model, "x", "d")
    inlay.merge(model, "x")
    with pytest.raises(ComposeError, match="come first"):
        inlay.use(model, "d")
    inlay.unmerge(model)
    if above != "full":
        inlay.use(model, "d", "x")
        both = output(model, bench.feed())
        inlay.merge(model, "d", "x")
        close(both, output(model, bench.feed()), 1e-5, "merged stack")
