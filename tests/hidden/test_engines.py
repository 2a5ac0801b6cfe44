"""Compiled whole, and with activations recomputed: the same steps."""

from __future__ import annotations

import pytest
import torch
from hidden_bases import base, batch, stir

import inlay
from inlay.methods import DiReFT, Houlsby, LinAdapter, LoReFT, ParallelAdapter, Pfeiffer

EDITS = "f2+l3"
STACKS = {  # all of them at once: each is compiled and recomputed, and they are seen to stand together
    "bert": [
        Houlsby(r=4), Pfeiffer(r=4).on("norm2"), ParallelAdapter(r=4, learned=True), LinAdapter(r=4),
        LoReFT(r=3, positions=EDITS),
    ],
    "llama": [
        LoReFT(r=3, positions=EDITS).on("mlp.down"),
        Houlsby(r=4, robust=True), Pfeiffer(r=4, drop=1), ParallelAdapter(r=4), LinAdapter(r=4),
        LoReFT(r=3, positions=EDITS), LoReFT(r=3, positions=EDITS, tied=False), DiReFT(r=3, positions="all"),
    ],
}  # fmt: skip


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


def adapted(name):
    """A model with a stack, its dropout off, and a batch whose prompts are marked where there are prompts."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if name == "bert" else {}
    model, inputs = base(name, num_hidden_layers=2, **off).train(), batch(name)
    stir(inlay.adapt(model, STACKS[name], head=None), 0.1)
    inlay.step(model, 0.5)
    if name == "llama":
        inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(9) < 5, -100)
    return model, inputs


@pytest.mark.parametrize("name", STACKS)
def test_activation_checkpointing(name):
    model, inputs = adapted(name)
    plain = step(model, model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same(step(model, model, inputs), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_compiled_whole(name):
    model, inputs = adapted(name)
    plain = step(model, model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(step(model, compiled, inputs), plain)
