"""LLaMA-Adapter against attention written out by hand, in generation, and beside other adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from token_models import (
    GREEDY,
    VISION,
    classifier,
    close,
    decoder,
    generated,
    ids,
    make,
    padded,
    randomised,
    same_without_cache,
    seq2seq,
)
from torch import Tensor, nn
from written import WRITTEN, Attend, attention, causal, heads

import inlay
from inlay.core.active import attached
from inlay.core.attention import recorded
from inlay.core.errors import SiteError
from inlay.core.towers import towers
from inlay.methods import OFT, DoRA, LLaMAAdapter, LongLoRA, LoRA, PrefixTuning
from inlay.models.quantise import quantise

P = 4
ROWS = [ids(9), ids(5, seed=2)]


def adapted(model: nn.Module, name: str = "default", seed: int = 3, where: Any = None, **options: Any) -> Any:
    """Attach prompts and gates far from their start; returns the built method."""
    method = LLaMAAdapter(**{"tokens": P, **options})
    return randomised(inlay.adapt(model, method, where, name=name), seed=seed).levels[0].method


def beside(model: nn.Module, method: Any, mask: Tensor) -> Attend:
    """Attention to real tokens, and apart from it to the prompts of the uppermost layers, as the paper writes it."""
    first = 2 - len(method.A)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        base = attention(q, k, v, causal(mask), 8**-0.5)
        if i < first:
            return base
        A, g = method.A[i - first].detach(), method.g[i - first].detach()
        if method.gate == "tanh":
            assert g.shape == (4,)
            g = g.tanh()
        if isinstance(model, transformers.GPT2LMHeadModel):
            c = model.transformer.h[i].attn.c_attn
            K, V = (A @ c.weight + c.bias)[:, 32:].chunk(2, -1)
        else:
            a = model.model.layers[i].self_attn
            K, V = A @ a.k_proj.weight.T, A @ a.v_proj.weight.T
        K, V = (heads(t, 8).expand(len(q), -1, -1, -1) for t in (K[None], V[None]))
        gates = g.expand(4).repeat_interleave(8)
        return base + gates * attention(q, K, V, torch.ones(1, 1, q.shape[2], P, dtype=torch.bool), 8**-0.5)

    return attend


@pytest.mark.parametrize("options", [{}, {"layers": 1, "gate": "plain"}])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "written"), WRITTEN.items())
def test_a_decoder_written_out(name: str, written: Any, how: str, side: str, options: Any) -> None:
    model = decoder(name, attention=how)
    base = model(ids(2, 9)).logits
    method = adapted(model, **options)
    if side == "none":
        batch = {"input_ids": ids(2, 9)}
        mask, positions = torch.ones(2, 9), torch.arange(9).expand(2, -1)
        assert not torch.allclose(model(**batch).logits, base, atol=1e-2)
    else:
        batch = padded(ROWS, side)
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch["position_ids"] = positions
    with torch.no_grad():
        hand = written(model, batch["input_ids"], positions, beside(model, method, mask))
    close(model(**batch).logits[mask.bool()], hand[mask.bool()])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral-sliding", "gemma", "gemma3", "phi", "gpt_neox"])
def test_prompts_become_keys_and_values_as_tokens_do(name: str) -> None:
    """At position 0, where rotary positions turn nothing; norms of keys and packed projections included."""
    model = decoder(name)
    (tower,) = towers(model)
    seen: list[Tensor] = []
    for spot in tower.spots:
        spot.module.register_forward_pre_hook(
            lambda m, a, kw: seen.append(a[0] if a else kw["hidden_states"]), with_kwargs=True
        )
    with torch.no_grad(), recorded(tower.spots) as recorders:
        model(ids(1, 1))
        for spot, recorder, h in zip(tower.spots, recorders, seen, strict=True):
            for made, found in zip(spot.keys_and_values(h[0]), recorder.found, strict=True):
                close(made, found)
    method = adapted(model)
    assert method.g.shape == (2, model.config.num_attention_heads)
    assert model(ids(1, 3)).logits.isfinite().all()


def test_the_uppermost_of_the_named_attentions() -> None:
    model = decoder("llama")
    assert inlay.adapt(model, LLaMAAdapter(layers=1)).levels[0].site.parts == ["model.layers.1.self_attn"]
    inlay.detach(model)
    where = ["block[1].attn", "block[0].attn"]
    assert [p[13] for p in inlay.adapt(model, LLaMAAdapter(), where).levels[0].site.parts] == ["0", "1"]
    inlay.detach(model)
    assert inlay.adapt(model, LLaMAAdapter(layers=1), exclude=["block[1]"]).levels[0].site.parts[0][13] == "0"


# ------------------------------------------------------------------------------------------------ generation
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    model = decoder(name)
    batch = padded(ROWS, "left")
    base = generated(model, batch)[1]
    adapted(model)
    tokens, logits = generated(model, batch)
    assert not torch.allclose(logits, base, atol=1e-2)
    same_without_cache(model, ROWS, tokens, logits)
    beams = model.generate(**batch, **GREEDY, num_beams=3)
    assert torch.equal(beams, model.generate(**batch, **GREEDY, num_beams=3, use_cache=False))


def test_caches_hold_no_prompt() -> None:
    model, x = decoder("llama"), ids(2, 9)
    adapted(model)
    assert model(x, use_cache=True).past_key_values.get_seq_length() == 9
    batch = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    static = generated(model, batch, cache_implementation="static", disable_compile=True)
    close(static[1], generated(model, batch)[1])


# ------------------------------------------------------------------------------------------------ other adapters
def test_rows_with_prompts_or_none() -> None:
    model, batch = decoder("llama"), padded([*ROWS, *ROWS], "left")
    adapted(model, "a")
    adapted(model, "b", tokens=2, layers=1, seed=8)
    names = ["a", None, "b", "b"]
    with inlay.route(model, names):
        out, logits = model(**batch).logits, generated(model, batch)[1]
    for i, which in enumerate(names):
        inlay.use(model, *([which] if which else []))
        row = {key: value[i : i + 1] for key, value in batch.items()}
        real = row["attention_mask"][0].bool()
        close(out[i][real], model(**row).logits[0][real])
        close(logits[i], generated(model, row)[1][0])


@pytest.mark.parametrize("other", [LoRA(r=2), DoRA(of=LoRA(r=2)), OFT(block_size=4)])
def test_the_base_projects_prompts_whatever_acts_on_it(other: Any) -> None:
    model, q = decoder("llama"), torch.randn(2, 4, 9, 8)
    adapter = randomised(inlay.adapt(model, [other.on("attn.k", "attn.v"), LLaMAAdapter(tokens=P)]), scale=0.3)
    method = next(level.method for level in adapter.levels if isinstance(level.method, LLaMAAdapter))
    aside = method.aside(0, q, None)
    a, g = model.model.layers[0].self_attn, method.g[0].tanh()
    K, V = (heads(method.A[:1, :P] @ m._parameters["weight"].T, 8)[0] for m in (a.k_proj, a.v_proj))
    hand = attention(q, *(t.expand(2, -1, -1, -1) for t in (K[None], V[None])), torch.tensor(True), 8**-0.5)
    close(aside, heads(g.repeat_interleave(8) * hand, 8))


def test_beside_a_prefix() -> None:
    """The softmax of the prompts is apart from that over tokens and prefix: their parts add up."""
    model = decoder("llama")
    module, x = model.model.layers[0].self_attn, ids(2, 9)
    outputs = []
    module.o_proj.register_forward_pre_hook(lambda m, a: outputs.append(a[0]))
    adapted(model, "a")
    randomised(inlay.adapt(model, PrefixTuning(tokens=2), name="b"))
    for names in ((), ("a",), ("b",), ("a", "b")):
        inlay.use(model, *names)
        model(x)
    none, a, b, both = outputs
    assert not torch.allclose(a, b, atol=1e-2)
    close(both - b, a - none)


def test_beside_longlora() -> None:
    model, x = decoder("llama").train(), ids(2, 9)
    longlora = LongLoRA(r=0, embeddings=False, norms=False)
    base = model(x).logits
    inlay.adapt(model, [longlora, LLaMAAdapter(tokens=P)])
    shifted = model(x).logits
    assert not torch.allclose(shifted, base, atol=1e-2)
    randomised(attached(model))
    assert not torch.allclose(model(x).logits, shifted, atol=1e-2)


def test_on_a_quantised_base() -> None:
    model, x = decoder("llama"), ids(2, 9)
    quantise(model, "int8", (), None)
    with torch.no_grad():
        base = model(x).logits
    adapter = inlay.adapt(model, LLaMAAdapter(tokens=P))
    assert torch.equal(model(x).logits, base)
    randomised(adapter)
    model(x, labels=x).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


# ------------------------------------------------------------------------------------------------ engines
def test_compiled_whole_it_gives_the_same() -> None:
    model = decoder("llama")
    adapted(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = ids(2, 9)
    close(compiled(x).logits, model(x).logits)


def test_checkpointing_gives_the_same_gradient() -> None:
    model, batch = decoder("llama"), padded(ROWS, "left")
    method = adapted(model)
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append(method.A.grad.clone())
        method.A.grad = None
    assert gradients[0].abs().sum() > 0
    close(*gradients)


def test_it_begins_as_the_base_to_the_bit_and_its_gates_open() -> None:
    model, x = decoder("llama"), ids(2, 9)
    model.requires_grad_(False)
    base = model(x).logits
    adapter = inlay.adapt(model, LLaMAAdapter(tokens=P))
    assert torch.equal(model(x).logits, base)
    (level,) = adapter.levels
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    losses = []
    for i in range(5):
        optimizer.zero_grad()
        loss = model(x, labels=x).loss
        loss.backward()
        assert level.method.g.grad.abs().min() > 0
        assert bool(level.method.A.grad.any()) == (i > 0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: classifier("bert"), "has no causal attention"),
        (lambda: make(transformers.AutoModel, VISION), "has no causal attention"),
        (lambda: seq2seq("bart"), "attends to an encoder|has no causal attention"),
        (lambda: decoder("gemma2"), "also has softcap"),
        (lambda: decoder("falcon"), "attention interface"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "must know where tokens enter"),
    ],
)
def test_where_it_cannot_be(model: Any, reason: str) -> None:
    with pytest.raises(SiteError, match=reason):
        inlay.adapt(model(), LLaMAAdapter())
