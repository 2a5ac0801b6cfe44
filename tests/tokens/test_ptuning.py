"""P-tuning: the encoder against torch's LSTM, its folding, and prompts that it makes; version 2's dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from token_models import (
    classifier,
    close,
    decoder,
    generated,
    ids,
    learns_with_every_tensor,
    padded,
    same_without_cache,
)
from torch import nn

import inlay
from inlay.core.errors import OptionError
from inlay.methods import PrefixTuning, PromptTuning, PTuning, PTuningV2

P = 4
ROWS = [ids(9), ids(5, seed=2)]
ENCODERS = [PTuning(tokens=P), PTuning(tokens=P, hidden=5, layers=3), PTuning(tokens=P, encoder="mlp", hidden=7)]


def adapted(model: nn.Module, method: Any) -> Any:
    """Attach a method, its tensors away from their start; returns the adapter."""
    adapter = inlay.adapt(model, method, head=None)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return adapter


def by_torch(method: PTuning, d: int) -> torch.Tensor:
    """The prompt from torch's own modules."""
    h = method.hidden or d // 2
    linear = list(method.mlp)
    if method.encoder == "mlp":
        return nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])(method.E)
    lstm = nn.LSTM(d, h, method.layers, bidirectional=True, batch_first=True)
    with torch.no_grad():
        for own, given in zip(lstm.parameters(), method.lstm, strict=True):
            own.copy_(given)
    return nn.Sequential(linear[0], nn.ReLU(), linear[1])(lstm(method.E[None])[0][0])


@pytest.mark.parametrize("spec", ENCODERS, ids=PTuning.label)
def test_the_encoder_makes_the_prompt(spec: PTuning) -> None:
    model, x = decoder("llama"), ids(2, 9)
    method = adapted(model, spec).levels[0].method
    P_hand = by_torch(method, 32).detach()
    close(method.prompt(), P_hand)
    out = model(x).logits
    inlay.detach(model)
    plain = inlay.adapt(model, PromptTuning(tokens=P)).levels[0].method
    with torch.no_grad():
        plain.P.copy_(P_hand)
    close(out, model(x).logits)


@pytest.mark.parametrize("spec", ENCODERS, ids=PTuning.label)
def test_folding_the_encoder_changes_nothing(spec: PTuning, tmp_path: Any) -> None:
    model, x = decoder("llama"), ids(2, 9)
    adapter = adapted(model, spec)
    method = adapter.levels[0].method
    assert adapter.adapter_parameters == method.count(method.site)
    with torch.no_grad():
        out = model(x).logits
    adapter.save(tmp_path)
    other = decoder("llama")
    loaded = inlay.load(other, tmp_path)
    assert torch.equal(other(x).logits, out)
    (level,) = loaded.levels
    assert dict(level.method.named_parameters()).keys() == {"P"}
    assert loaded.adapter_parameters == method.kept(method.site) == P * 32
    other(x).logits.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in loaded.parameters())
    loaded.save(tmp_path / "again")
    again = decoder("llama")
    inlay.load(again, tmp_path / "again")
    assert torch.equal(again(x).logits, out)


@pytest.mark.parametrize("spec", ENCODERS, ids=PTuning.label)
def test_every_tensor_of_the_encoder_learns(spec: PTuning) -> None:
    model, x = decoder("llama"), ids(2, 9)
    adapter = inlay.adapt(model, spec)
    learns_with_every_tensor(model, adapter, x)


def test_neighbours_are_learnt_together() -> None:
    """A token's vector depends on all rows of E through the LSTM, on its own alone through the MLP."""
    for spec, others in ((PTuning(tokens=P), True), (PTuning(tokens=P, encoder="mlp"), False)):
        method = adapted(decoder("llama"), spec).levels[0].method
        method.prompt()[0].sum().backward()
        moved = method.E.grad.abs().sum(1)
        assert moved[0] > 0
        assert bool((moved[1:] > 0).all()) == others
        assert bool(moved[1:].any()) == others


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    model, batch = decoder(name), padded(ROWS, "left")
    base = generated(model, batch)[1]
    adapted(model, PTuning(tokens=P))
    tokens, logits = generated(model, batch)
    assert not torch.allclose(logits, base, atol=1e-3)
    same_without_cache(model, ROWS, tokens, logits)


def test_compiled_whole_it_gives_the_same() -> None:
    model, x = classifier("bert"), ids(2, 9)
    adapted(model, PTuning(tokens=P))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(x).logits, model(x).logits)


# ------------------------------------------------------------------------------------------------ version 2
@pytest.mark.parametrize("options", [{}, {"reparameterize": True, "hidden": 12}])
def test_deep_prompts_are_a_prefix_with_dropout(options: dict[str, Any]) -> None:
    model, x = classifier("bert"), ids(2, 9)
    adapter = adapted(model, PTuningV2(tokens=P, dropout=0.5, **options))
    method = adapter.levels[0].method
    out = model(x).logits
    prefix = inlay.adapt(model, PrefixTuning(tokens=P, **options), name="prefix", head=None)
    with torch.no_grad():
        for ours, theirs in zip(prefix.parameters(), adapter.parameters(), strict=True):
            ours.copy_(theirs)
    assert torch.equal(model(x).logits, out)
    inlay.use(model, "default")
    method.train()
    P_k, P_v = method.prefix(1)
    whole = method.whole(1)
    for kept, t in zip((P_k, P_v), whole, strict=True):
        assert 0.2 < kept.eq(0).double().mean() < 0.8
        close(kept[kept.ne(0)], 2 * t[kept.ne(0)])
    assert not torch.allclose(model(x).logits, out, atol=1e-3)
    close(method.stored()["P_k"][1], whole[0])


def test_starts() -> None:
    model = decoder("llama")
    for options, deviation in (({}, 1.0), ({"scale": 0.1}, 0.1), ({"init": "zero"}, 0.0)):
        method = inlay.adapt(model, PTuningV2(tokens=60, **options)).levels[0].method
        assert method.P_k.std().item() == pytest.approx(deviation, rel=0.1)
        inlay.detach(model)
    method = inlay.adapt(model, PTuningV2(reparameterize=True, init="zero")).levels[0].method
    assert not any(t.any() for t in method.stored().values())
    with pytest.raises(OptionError, match="init"):
        PTuningV2(init="vocabulary")
    with pytest.raises(OptionError, match="encoder"):
        PTuning(encoder="gru")
