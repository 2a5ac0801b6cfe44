"""`torch.compile(fullgraph=True)`: the same steps, in one graph, that switching adapters never makes stale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_steps import KINDS, adapted, close, lively, same, train
from torch import Tensor, nn

import inlay
from inlay.core.errors import ComposeError, SiteError
from laws.benches import benches, run
from laws.cases import Case, cases, model_of, stir

UNCOMPILED = {"lstm": "Dynamo does not support RNN, GRU, or LSTM"}
"""What cannot be compiled into one graph: bases, by bench, that torch cannot compile without any adapter either."""
BENCHES = ("linear", "bert", "llama", "gpt2-qv", "conv2d")
"""Where every method is compiled."""
OTHERS = ("batchnorm", "embedding-tied", "mha", "mixtral", "vit")
FEW = ("lora", "full", "houlsby", "prefixtuning", "vpt", "pgn", "visualprompt")
"""Where a few are."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing compiled before; a second compilation is an error unless a test allows it."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: Any = "aot_eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_same_steps(kind: str) -> None:
    feed = benches()["classifier"].feed()
    wanted = train(adapted(KINDS[kind]), feed)
    model = adapted(KINDS[kind])
    same(train(model, feed, forward=compiled(model)), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weight", "positions", "prefix"])
def test_same_steps_through_inductor(kind: str) -> None:
    feed = benches()["classifier"].feed()
    wanted = train(adapted(KINDS[kind]), feed)
    model = adapted(KINDS[kind])
    same(train(model, feed, forward=compiled(model, "inductor")), wanted, 1e-4)


def chosen(case: Case) -> bool:
    return case.bench.name in BENCHES or (case.bench.name in OTHERS and type(case.method).name() in FEW)


@pytest.mark.slow
@pytest.mark.filterwarnings(  # Dynamo looks at .grad of what hooks of the whole model hand to its forward
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in cases() if chosen(c)])
def test_same_steps_everywhere(case: Case) -> None:
    try:
        fresh, rate = lively(case, case.feed())
    except (SiteError, ComposeError) as error:
        pytest.skip(str(error))  # the laws check refusals
    model, plain = fresh(), fresh()
    torch.manual_seed(0)  # what is drawn in a forward
    wanted = train(plain, case.feed(), rate=rate)
    torch.manual_seed(0)
    same(train(model, case.feed(), forward=compiled(model), rate=rate), wanted)


@pytest.mark.parametrize("bench", UNCOMPILED)
def test_what_cannot_be_compiled_is_the_base_itself(bench: str) -> None:
    model, feed = model_of(benches()[bench]), benches()[bench].feed()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=UNCOMPILED[bench]):
        run(compiled(model), feed)


def test_a_compiled_model_follows_what_acts() -> None:
    bench = benches()["linear"]
    model, feed = model_of(bench).eval(), bench.feed()
    for seed, (name, spec) in enumerate({"a": "lora(r=2)", "b": "pfeiffer(r=2)", "c": "bitfit"}.items()):
        stir(inlay.adapt(model, spec, ["up", "down"], name=name), seed)
    fast = compiled(model, "eager")

    def outputs() -> list[Tensor]:
        """With each adapter, with two, with none, with a routed batch, and with the first again."""
        found = []
        for names in (("a",), ("b",), ("c",), ("a", "b"), ()):
            inlay.use(model, *names)
            found.append(run(chosen, feed))
        inlay.use(model, "a")
        with inlay.disabled(model):
            found.append(run(chosen, feed))
        with inlay.route(model, ["a", None, "b", "c"]):
            found.append(run(chosen, feed))
        return [*found, run(chosen, feed)]

    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        chosen: Any = model
        wanted = outputs()
        chosen = fast
        for k, (a, b) in enumerate(zip(outputs(), wanted, strict=True)):
            close(f"output {k}", a, b, 1e-5)
    assert all(not a.equal(b) for i, a in enumerate(wanted[:5]) for b in wanted[:i]), "adapters must differ"


def test_a_wrong_graph_is_seen() -> None:
    def wrong(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        return lambda *args: tuple(t * 1.001 for t in graph(*args))

    feed = benches()["linear"].feed()
    wanted = train(adapted("lora(r=2)", "linear", where=["up", "out"]), feed)
    model = adapted("lora(r=2)", "linear", where=["up", "out"])
    with pytest.raises(AssertionError, match="differs by"):
        same(train(model, feed, forward=compiled(model, wrong)), wanted)
