"""Prefix tuning against attention written out by hand, and against the words it can stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from token_models import (
    GREEDY,
    VISION,
    classifier,
    close,
    decoder,
    generated,
    ids,
    learns_with_every_tensor,
    make,
    padded,
    randomised,
    same_without_cache,
    seq2seq,
)
from torch import Tensor, nn
from written import WRITTEN, Attend, attention, causal, heads, llama

import inlay
from inlay.core.errors import AdapterError, CheckpointError, OptionError, SiteError
from inlay.methods import LoRA, PrefixTuning, PromptTuning

P = 4
ROWS = [ids(9), ids(5, seed=2)]
WORDS = {"tokens": P, "init": "text", "text_ids": [5, 6, 7, 8]}


def prefixed(model: nn.Module, name: str = "default", seed: int = 3, where: Any = None, **options: Any) -> Any:
    """Attach a prefix far from its start; returns the built method."""
    method = PrefixTuning(**{"tokens": P, **options})
    return randomised(inlay.adapt(model, method, where, name=name, head=None), seed=seed).levels[0].method


# ------------------------------------------------------------------------------------------------ oracles
def before(P_k: Tensor, k: Tensor) -> Tensor:
    return torch.cat([P_k.detach().expand(len(k), -1, -1, -1), k], 2)


def prefixing(method: Any, mask: Tensor) -> Attend:
    """Attention to a prefix and to real tokens up to the query."""
    allowed = torch.cat([torch.ones(len(mask), 1, mask.shape[1], P, dtype=torch.bool), causal(mask)], 3)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, before(method.P_k[i], k), before(method.P_v[i], v), allowed, 8**-0.5)

    return attend


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "written"), WRITTEN.items())
def test_a_decoder_written_out(name: str, written: Any, how: str, side: str, shift: bool) -> None:
    model = decoder(name, attention=how)
    method = prefixed(model, shift=shift)
    if side == "none":
        batch = {"input_ids": ids(2, 9)}
        mask, positions = torch.ones(2, 9), torch.arange(9).expand(2, -1)
    else:
        batch = padded(ROWS, side)
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch["position_ids"] = positions
    with torch.no_grad():
        hand = written(model, batch["input_ids"], positions + (P if shift else 0), prefixing(method, mask))
    close(model(**batch).logits[mask.bool()], hand[mask.bool()])


@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_one_attention_of_an_encoder(kind: str, how: str) -> None:
    if kind == "bert":
        model, batch = classifier("bert", attention=how), padded(ROWS, "right")
        module = model.bert.encoder.layer[1].attention.self
        projections = module.query, module.key, module.value
        mask = batch["attention_mask"].bool()
    else:
        model, batch = make(transformers.AutoModel, VISION, how), {"pixel_values": torch.randn(2, 3, 16, 16)}
        module = model.layers[1].attention
        projections = module.q_proj, module.k_proj, module.v_proj
        mask = torch.ones(2, 5, dtype=torch.bool)
    method = prefixed(model)
    seen: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda m, a, kw, out: seen.extend([a[0] if a else kw["hidden_states"], out[0]]),
                                     with_kwargs=True),
    ]  # fmt: skip
    model(**batch)
    handles[0].remove()
    q, k, v = (heads(F.linear(seen[0], m.weight, m.bias), 8) for m in projections)
    allowed = torch.cat([torch.ones(2, 1, 1, P, dtype=torch.bool), mask[:, None, None]], 3)
    hand = attention(q, before(method.P_k[1], k), before(method.P_v[1], v), allowed, 1 / math.sqrt(8))
    if kind == "vit":
        hand = F.linear(hand, module.o_proj.weight, module.o_proj.bias)
    close(seen[1], hand)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma", "phi", "gpt_neox", "opt"])
def test_the_keys_and_values_of_words_are_the_words(name: str) -> None:
    """A prefix made from words, its positions counted, is a prompt of these words: two ways to one network."""
    model, batch = decoder(name), padded(ROWS, "left")
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found, base = [], generated(model, batch)[1]
    for method in (PrefixTuning(**WORDS, shift=True), PromptTuning(**WORDS)):
        inlay.adapt(model, method)
        found.append((model(**batch).logits[batch["attention_mask"].bool()], generated(model, batch)[1]))
        inlay.detach(model)
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])
    assert not torch.allclose(found[0][1], base, atol=1e-2)


def test_relative_bias_is_not_given_to_a_prefix() -> None:
    model, x, y = seq2seq("t5", attention="eager"), ids(2, 9), ids(2, 5, seed=4)
    method = prefixed(model)
    out = model(x, decoder_input_ids=y, output_attentions=True)
    module = model.encoder.block[0].layer[0]
    h = module.layer_norm(model.encoder.embed_tokens(x))
    q, k = (heads(F.linear(h, m.weight), 6) for m in (module.SelfAttention.q, module.SelfAttention.k))
    scores = q @ before(method.P_k[0], k).transpose(2, 3)
    scores[..., P:] += module.SelfAttention.compute_bias(9, 9)
    close(out.encoder_attentions[0], scores.softmax(-1))
    sdpa = seq2seq("t5", attention="sdpa")
    prefixed(sdpa)
    close(sdpa(x, decoder_input_ids=y).logits, out.logits)


# ------------------------------------------------------------------------------------------------ generation
@pytest.mark.parametrize(("name", "shift"), [("llama", False), ("llama", True), ("gpt2", True), ("gemma2", False)])
def test_generation_with_a_cache_equals_generation_without(name: str, shift: bool) -> None:
    model = decoder(name)
    prefixed(model, shift=shift)
    batch = padded(ROWS, "left")
    tokens, logits = generated(model, batch)
    same_without_cache(model, ROWS, tokens, logits)
    beams = model.generate(**batch, **GREEDY, num_beams=3)
    assert torch.equal(beams, model.generate(**batch, **GREEDY, num_beams=3, use_cache=False))


def test_the_cache_holds_no_prefix() -> None:
    model, x = decoder("llama"), ids(2, 9)
    prefixed(model)
    assert model(x, use_cache=True).past_key_values.get_seq_length() == 9


def test_a_static_cache() -> None:
    model, x = decoder("llama"), ids(2, 9)
    prefixed(model)
    batch = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    static = generated(model, batch, cache_implementation="static", disable_compile=True)
    close(static[1], generated(model, batch)[1])


@pytest.mark.parametrize("where", [None, ["attn", "cross"]])
def test_an_encoder_decoder_generates_with_its_cache(where: Any) -> None:
    model, batch = seq2seq("t5"), padded(ROWS, "right")
    prefixed(model, where=where)
    tokens, logits = generated(model, batch)
    for i, row in enumerate(ROWS):
        close(logits[i], model(row[None], decoder_input_ids=tokens[i : i + 1]).logits[0, :-1])


# ------------------------------------------------------------------------------------------------ implementations
def test_flash_attention_is_given_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention's own conventions, written out: padding masks (batch, keys), causal triangles aligned right."""

    def flash(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **rest: Any) -> Any:
        n, m = q.shape[2], k.shape[2]
        allowed = torch.ones(n, m, dtype=torch.bool).tril(m - n)[None, None].expand(len(q), -1, -1, -1)
        if attention_mask is not None:
            assert attention_mask.shape == (len(q), m)
            allowed = allowed & attention_mask.bool()[:, None, None]
        return attention(q, k, v, allowed, rest["scaling"]).unflatten(-1, (q.shape[1], -1)), None

    interface = transformers.AttentionInterface()
    monkeypatch.setitem(interface._global_mapping, "flash_attention_2", flash)
    model = decoder("llama")
    prefixed(model, "a")
    prefixed(model, "b", tokens=2)
    for batch in ({"input_ids": ids(2, 9)}, padded(ROWS, "right")):
        for names in (["a", "a"], ["b", None]):
            found = []
            for how in ("sdpa", "flash_attention_2"):
                model.config._attn_implementation_internal = how
                with inlay.route(model, names):
                    found.append(model(**batch).logits[batch.get("attention_mask", torch.ones(2, 9)).bool()])
            close(*found)


def test_an_implementation_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transformers.AttentionInterface()._global_mapping, "other", lambda *a, **kw: None)
    model = decoder("llama")
    prefixed(model)
    model.config._attn_implementation_internal = "other"
    with pytest.raises(AdapterError, match="not with 'other'"):
        model(ids(2, 9))


def test_the_implementation_can_be_changed_while_attached() -> None:
    model, x = decoder("llama", attention="sdpa"), ids(2, 9)
    prefixed(model)
    out = model(x).logits
    model.set_attn_implementation("eager")
    maps = model(x, output_attentions=True)
    close(maps.logits, out)
    assert [a.shape for a in maps.attentions] == [(2, 4, 9, P + 9)] * 2


# ------------------------------------------------------------------------------------------------ several adapters
@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize("shift", [False, True])
def test_rows_with_prefixes_of_different_lengths_or_none(how: str, shift: bool) -> None:
    model = decoder("llama", attention=how)
    prefixed(model, "a", shift=shift)
    prefixed(model, "b", tokens=2, seed=8)
    names = ["a", None, "b", "b"]
    for batch in (padded([*ROWS, *ROWS], "left"), {"input_ids": ids(4, 9)}):
        with inlay.route(model, names):
            out = model(**batch).logits
            logits = generated(model, {"attention_mask": torch.ones(4, 9), **batch})[1]
        for i, which in enumerate(names):
            inlay.use(model, *([which] if which else []))
            row = {key: value[i : i + 1] for key, value in batch.items()}
            real = row.get("attention_mask", torch.ones(1, 9))[0].bool()
            close(out[i][real], model(**row).logits[0][real])
            close(logits[i], generated(model, {"attention_mask": torch.ones(1, 9), **row})[1][0])


def test_rows_of_an_encoder() -> None:
    model, x = classifier("bert"), ids(3, 9)
    prefixed(model, "a")
    prefixed(model, "b", tokens=2, seed=8)
    with inlay.route(model, ["a", None, "b"]):
        out = model(x).logits
    for i, which in enumerate(["a", None, "b"]):
        inlay.use(model, *([which] if which else []))
        close(out[i], model(x[i : i + 1]).logits[0])


def test_two_prefixes_stand_side_by_side() -> None:
    model, x = decoder("llama"), ids(2, 9)
    a, b = prefixed(model, "a"), prefixed(model, "b", tokens=2, seed=8)
    inlay.use(model, "a", "b")
    out = model(x).logits
    both = prefixed(model, "c", tokens=P + 2)
    with torch.no_grad():
        both.P_k.copy_(torch.cat([a.P_k, b.P_k], 2))
        both.P_v.copy_(torch.cat([a.P_v, b.P_v], 2))
    inlay.use(model, "c")
    close(model(x).logits, out)


def test_some_layers_only() -> None:
    model, x = decoder("llama"), ids(2, 9)
    method = prefixed(model, where="block[1].attn")
    assert method.P_k.shape == (1, 2, P, 8)
    layer_0 = model(x, output_hidden_states=True).hidden_states[1]
    with inlay.disabled(model):
        close(layer_0, model(x, output_hidden_states=True).hidden_states[1])
    inlay.detach(model)
    assert inlay.adapt(model, PrefixTuning(), layers=[0]).levels[0].method.P_k.shape[0] == 1
    inlay.detach(model)
    assert inlay.adapt(model, PrefixTuning(), exclude=["block[0]"]).levels[0].site.parts == ["model.layers.1.self_attn"]


def test_with_a_weight_method_beside_it() -> None:
    model, x = decoder("llama"), ids(2, 9)
    adapter = randomised(inlay.adapt(model, [PrefixTuning(tokens=P), LoRA(r=2)]), scale=0.3)
    out = model(x).logits
    levels = {level.site.key: level.method for level in adapter.levels}
    with torch.no_grad():
        for key in [key for key in levels if "proj" in key]:
            model.get_submodule(key)._parameters["weight"] += levels[key].delta().dense()
        inlay.use(model)
        hand = llama(model, x, torch.arange(9).expand(2, -1), prefixing(levels["model.prefix"], torch.ones(2, 9)))
    close(out, hand)


# ------------------------------------------------------------------------------------------------ the MLP
def test_folding_the_mlp_changes_nothing(tmp_path: Any) -> None:
    model, x = decoder("llama"), ids(2, 9)
    adapter = inlay.adapt(model, PrefixTuning(tokens=P, reparameterize=True, hidden=12))
    randomised(adapter)
    (level,) = adapter.levels
    assert adapter.adapter_parameters == level.method.count(level.site) == P * 32 + 33 * 12 + 13 * 2 * 2 * 16
    E, (inner, outer) = level.method.E, level.method.mlp
    whole = outer(torch.tanh(inner(E))).view(P, 2, 2, 2, 8)  # tokens, layers, key or value, heads, size
    for i in range(2):
        for t, part in zip(level.method.prefix(i), whole[:, i].unbind(1), strict=True):
            close(t, part.transpose(0, 1))
    out = model(x).logits
    adapter.save(tmp_path)
    other = decoder("llama")
    loaded = inlay.load(other, tmp_path)
    assert torch.equal(other(x).logits, out)
    (level,) = loaded.levels
    assert dict(level.method.named_parameters()).keys() == {"P_k", "P_v"}
    assert loaded.adapter_parameters == level.method.kept(level.site) == 2 * 2 * 16 * P
    other(x).logits.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in loaded.parameters())
    loaded.save(tmp_path / "again")
    again = decoder("llama")
    inlay.load(again, tmp_path / "again")
    assert torch.equal(again(x).logits, out)


def test_every_tensor_of_the_mlp_learns() -> None:
    model, x = decoder("llama"), ids(2, 9)
    adapter = inlay.adapt(model, PrefixTuning(tokens=P, reparameterize=True, hidden=12))
    learns_with_every_tensor(model, adapter, x)


def test_starts_and_counts() -> None:
    model = decoder("llama")
    for options, check in (({}, lambda t: 0.015 < t.std() < 0.025), ({"scale": 1.0}, lambda t: 0.8 < t.std() < 1.2),
                           ({"init": "zero"}, lambda t: (t == 0).all())):  # fmt: skip
        adapter = inlay.adapt(model, PrefixTuning(tokens=30, **options))
        (level,) = adapter.levels
        assert check(level.method.P_k)
        assert adapter.adapter_parameters == level.method.count(level.site) == 2 * 2 * 16 * 30
        assert not level.method.starts_at_base
        inlay.detach(model)
    adapter = inlay.adapt(seq2seq("t5"), PrefixTuning(tokens=P))
    assert [level.site.key for level in adapter.levels] == ["encoder.prefix", "decoder.prefix"]
    assert adapter.adapter_parameters == 2 * (2 * 2 * 24 * P)


# ------------------------------------------------------------------------------------------------ engines, life
def test_compiled_whole_it_gives_the_same() -> None:
    model = decoder("llama")
    prefixed(model, shift=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = ids(2, 9)  # no mask: the causal triangle is drawn around the prefix
    close(compiled(x).logits, model(x).logits)


def test_checkpointing_gives_the_same_gradient() -> None:
    model, batch = decoder("llama"), padded(ROWS, "left")
    method = prefixed(model)
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append(method.P_k.grad.clone())
        method.P_k.grad = None
    assert gradients[0].abs().sum() > 0
    close(*gradients)


def test_nothing_is_left_after_detaching() -> None:
    model, x = decoder("llama"), ids(2, 9)
    keys, base = list(model.state_dict()), model(x).logits
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    adapter = inlay.adapt(model, PrefixTuning(**WORDS))
    assert model.config._attn_implementation == "sdpa"
    assert "inlay" not in model.config.to_json_string()
    adapter.delete()
    assert torch.equal(model(x).logits, base)
    inlay.detach(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x).logits, base)
    for name, module in model.named_modules():
        assert module.config is attributes[name]["config"] if "config" in attributes[name] else True
        assert module.__dict__.keys() == attributes[name].keys()


def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path: Any) -> None:
    model, batch = make(transformers.AutoModel, VISION), {"pixel_values": torch.randn(2, 3, 16, 16)}
    base = model(**batch).last_hidden_state
    randomised(inlay.adapt(model, PrefixTuning(tokens=P))).save(tmp_path)
    out = model(**batch).last_hidden_state
    assert not torch.allclose(out, base, atol=1e-3)
    other = make(transformers.AutoModel, VISION)
    inlay.load(other, tmp_path)
    assert torch.equal(other(**batch).last_hidden_state, out)
    with pytest.raises(CheckpointError, match=r"no tower|does not have"):
        inlay.load(classifier("bert"), tmp_path)
    with torch.no_grad():
        other = make(transformers.AutoModel, VISION)
        other.layers[0].attention.q_proj.weight.add_(1.0)
    with pytest.raises(CheckpointError, match="another base"):
        inlay.load(other, tmp_path)


# ------------------------------------------------------------------------------------------------ refusals
def test_what_cannot_be_is_refused() -> None:
    model = decoder("llama")
    with pytest.raises(OptionError, match="not an MLP"):
        PrefixTuning(init="vocabulary", reparameterize=True)
    with pytest.raises(OptionError, match="needs token ids"):
        PrefixTuning(init="text")
    with pytest.raises(SiteError, match="finds no attention"):
        inlay.adapt(model, PrefixTuning(), where="mlp.up")
    with pytest.raises(SiteError, match="attention interface"):
        inlay.adapt(decoder("falcon"), PrefixTuning())
    with pytest.raises(SiteError, match="takes no position ids"):
        inlay.adapt(seq2seq("t5"), PrefixTuning(shift=True))
    with pytest.raises(SiteError, match="token ids can begin with words"):
        inlay.adapt(make(transformers.AutoModel, VISION), PrefixTuning(init="vocabulary"))
    with pytest.raises(inlay.core.errors.MergeError, match="PrefixTuning"):
        inlay.adapt(model, PrefixTuning()).merge()
