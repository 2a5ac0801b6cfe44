"""Activation checkpointing: blocks that the backward pass runs again give the same steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_steps import KINDS, adapted, lively, loss_of, recomputed, same, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import inlay
from inlay.core.active import attached
from inlay.core.container import Inlay
from inlay.core.errors import ComposeError, SiteError
from inlay.methods import LoReFT
from laws.benches import Inputs, benches
from laws.cases import Case, cases, model_of, stir

BENCHES, IMAGES = ("classifier", "bert", "llama", "gpt2-mlp"), ("vpt", "pgn", "visualprompt")
"""Where every method is tried, and the methods that are tried on images."""
EDITS = LoReFT(r=2, positions="f2+l1").on("mlp.down")
"""Inside the blocks, where it is run again."""


class Counted:
    """A checkpointing function that counts what it ran, first and again."""

    def __init__(self, **options: Any) -> None:
        self.options, self.runs = options, 0

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        def run(*inner: Any, **options: Any) -> Any:
            self.runs += 1
            return function(*inner, **options)

        return checkpoint(run, *args, **self.options, **kwargs)


def shorter(feed: Inputs) -> Inputs:
    """Another batch with other lengths, or of fewer images."""
    if "pixel_values" in feed:
        return {"pixel_values": feed["pixel_values"][:2]}
    mask = torch.ones_like(feed["input_ids"])
    mask[0, 3:], mask[2, 2:] = 0, 0
    return feed | {"input_ids": feed["input_ids"].flip(0), "attention_mask": mask}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_same_steps(kind: str, reentrant: bool) -> None:
    feed = benches()["classifier"].feed()
    wanted = train(adapted(KINDS[kind]), feed)
    same(train(recomputed(adapted(KINDS[kind]), reentrant), feed), wanted)


def tried(case: Case) -> bool:
    return case.bench.name in BENCHES or (case.bench.name == "vit" and case.method.name() in IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in cases() if tried(c)])
def test_same_steps_everywhere(case: Case, reentrant: bool) -> None:
    feeds = (case.feed(), shorter(case.feed()))
    try:
        fresh, rate = lively(case, *feeds)
    except (SiteError, ComposeError) as error:
        pytest.skip(str(error))  # the laws check refusals
    runs = []
    for model in (recomputed(fresh(), reentrant), fresh()):
        torch.manual_seed(0)  # what rests in a forward is drawn
        runs.append(train(model, *feeds, rate=rate))
    same(*runs)


@pytest.mark.parametrize("method", ["lora(r=2, dropout=0.4)", "loha(r=2, row_dropout=0.4)", "houlsby(r=3)", "bitfit"])
def test_around_a_part_of_any_model(method: str) -> None:
    """torch's own function around a block; with dropout, both runs draw the same."""
    again = Counted(use_reentrant=False)

    def fresh(through: Any) -> nn.Module:
        model = adapted(method, "timm", where=None if method == "bitfit" else ["attn.q", "mlp.up"], head=None)
        for block in model.blocks:
            block.forward = through(block.forward)
        return model

    feed = benches()["timm"].feed()
    torch.manual_seed(0)
    wanted = train(fresh(lambda f: f), feed)
    torch.manual_seed(0)
    same(train(fresh(lambda f: lambda x: again(f, x)), feed), wanted)
    assert again.runs == 3 * 2 * 2, "three steps of two blocks, each run twice"


def test_inside_one_compiled_graph() -> None:
    """Dynamo must be told that what a forward notes for its own hooks need not be noted again when it is run again."""
    feed = benches()["bert"].feed()
    wanted = train(adapted([EDITS, "lora(r=2)"], "bert"), feed)
    model = recomputed(adapted([EDITS, "lora(r=2)"], "bert"))
    model.config.use_cache = False  # transformers would log that it does so, in the middle of the graph
    model.disable_input_require_grads()  # its hook, for reentrant checkpointing, cannot be traced
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        same(train(model, feed, forward=torch.compile(model, fullgraph=True, backend="aot_eager")), wanted)


# ---------------------------------------------------------------------- what acts has changed before the backward pass
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [EDITS, [EDITS, "prompttuning(tokens=3)"]])
def test_two_batches_before_one_backward_pass(method: Any, reentrant: bool) -> None:
    feed = benches()["bert"].feed()
    feeds = (feed, shorter(feed))
    wanted = train(adapted(method, "bert"), *feeds)
    same(train(recomputed(adapted(method, "bert"), reentrant), *feeds), wanted)


def test_without_what_was_remembered_the_steps_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = benches()["bert"].feed()
    feeds = (feed, shorter(feed))
    wanted = train(adapted(EDITS, "bert"), *feeds)
    monkeypatch.setattr(Inlay, "remember", lambda self, output: None)
    with pytest.raises(AssertionError, match="differs by"):
        same(train(recomputed(adapted(EDITS, "bert")), *feeds), wanted)


def two() -> nn.Module:
    model = model_of(benches()["bert"])
    for seed, name in enumerate("ab"):
        stir(inlay.adapt(model, ["lora(r=2)", EDITS], name=name), seed, by=0.1)
    inlay.use(model, "a", "b")
    return model.train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_backward_pass_after_the_adapters_were_switched(reentrant: bool) -> None:
    feed, gradients = benches()["bert"].feed(), []
    for model in (two(), recomputed(two(), reentrant)):
        with inlay.route(model, ["a", None, "b", "a"]):
            loss = loss_of(model, feed)
        with inlay.disabled(model.eval()), torch.no_grad():
            loss_of(model, shorter(feed))
        model.train()
        loss.backward()
        assert attached(model).active == ["a", "b"]
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    agree(*gradients)


def test_a_backward_pass_that_fails_leaves_no_trace() -> None:
    feed = benches()["bert"].feed()
    model = recomputed(two())
    inlay.use(model, "a")
    with torch.no_grad():
        wanted = loss_of(model, feed)
    loss = loss_of(model, feed)
    first = next(p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n)
    handle = first.register_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        loss.backward()
    handle.remove()
    inlay.use(model, "b")
    assert attached(model).active == ["b"]
    with torch.no_grad():
        assert not loss_of(model, feed).equal(wanted)
        inlay.use(model, "a")
        assert loss_of(model, feed).equal(wanted)


def test_no_hook_outlives_its_forward() -> None:
    model = two()
    kept = nn.Parameter(torch.ones(3))
    attached(model).remember([kept, {"also": kept * 2}])
    assert not kept._backward_hooks


def fail(gradient: Tensor) -> Tensor:
    raise RuntimeError("planted")


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(g.any() for g in wanted.values())
    for name, g in wanted.items():
        torch.testing.assert_close(found[name], g, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
