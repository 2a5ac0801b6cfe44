"""Compiled whole, and with activations recomputed: the same steps."""

from __future__ import annotations

import pytest
import torch
from hidden_bases import base, batch, stir

import inlay
from inlay.methods import DiReFT, Houlsby, LinAdapter, LoReFT, ParallelAdapter, Pfeiffer

METHODS = [
    Houlsby(r=4, robust=True), Pfeiffer(r=4, drop=1), Pfeiffer(r=4).on("norm2"), ParallelAdapter(r=4, learned=True),
    LinAdapter(r=4), LoReFT(r=3, positions="f2+l3"), LoReFT(r=3, positions="f2+l3", tied=False),
    LoReFT(r=3, positions="all"), DiReFT(r=3, positions="f2+l3"),
]  # fmt: skip


def step(model, forward, inputs):
    """Logits and gradients of one training step."""
    logits = forward(**inputs).logits
    logits.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), grads


def same(a, b):
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)
    assert a[1].keys() == b[1].keys()
    assert len(a[1]) > 0
    for name, grad in a[1].items():
        torch.testing.assert_close(grad, b[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_activation_checkpointing(name, method):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if name == "bert" else {}
    model, inputs = base(name, **dropout).train(), batch(name)
    stir(inlay.adapt(model, method, head=None))
    inlay.core.adapter.step(model, 0.5)
    if name == "llama":
        inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(9) < 5, -100)
    plain = step(model, model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same(step(model, model, inputs), plain)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compiled_whole(name, method):
    model, inputs = base(name), batch(name)
    stir(inlay.adapt(model, method, head=None))
    plain = step(model, model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(step(model, compiled, inputs), plain)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, plain[0], atol=1e-5, rtol=1e-5)
