"""Virtual tokens before a real language model: they learn to begin stories its way and generate with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from token_models import close, generated, same_without_cache

import inlay
import inlay.models
from inlay.methods import DePT, LLaMAAdapter, PrefixTuning, PromptTuning, PTuning, PTuningV2

STORIES = ["Tim had a big red ball. He", "One day"]
TARGET = "Sara saw a green frog. The frog said hello to Sara and they sang a song."


@pytest.mark.parametrize(
    "method",
    [
        PromptTuning(tokens=8),
        PrefixTuning(tokens=8, init="vocabulary"),
        PrefixTuning(tokens=8, reparameterize=True, hidden=64),
        PTuning(tokens=8),
        PTuningV2(tokens=8),
        DePT(tokens=8, r=8),
        LLaMAAdapter(),
    ],
)
def test_stories(method: Any, tmp_path: Any) -> None:
    opened = inlay.models.open("stories15m", "causal-lm")
    model, tokenizer = opened.model, opened.processor
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    batch = dict(tokenizer(STORIES, return_tensors="pt", padding=True))
    batch.pop("token_type_ids", None)
    base = generated(model, batch)[1]
    adapter = inlay.adapt(model, method)
    target = tokenizer(TARGET, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(adapter.parameters(), method.learning_rate)
    losses = []
    for _ in range(16):
        loss = model(target, labels=target).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    tokens, logits = generated(model, batch)
    assert not torch.allclose(logits, base, atol=0.1)
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    same_without_cache(model, rows, tokens, logits)
    adapter.save(tmp_path)
    other = inlay.models.open("stories15m", "causal-lm").model
    inlay.load(other, tmp_path)
    close(generated(other, batch)[1], logits, 1e-9)
