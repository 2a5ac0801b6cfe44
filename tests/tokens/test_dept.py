"""DePT against the base model given [P; E(x) + s A B] by hand, with padding, caches, routes and other adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from token_models import (
    ABSOLUTE,
    GREEDY,
    classifier,
    close,
    decoder,
    generated,
    ids,
    padded,
    randomised,
    same_without_cache,
    seq2seq,
)
from torch import Tensor, nn

import inlay
from inlay.core.errors import AdapterError, SiteError
from inlay.methods import DePT, LoRA, PromptTuning

M, R, S = 3, 2, 16
ROWS = [ids(9), ids(5, seed=2)]


def adapted(model: nn.Module, name: str = "default", seed: int = 3, **options: Any) -> Any:
    """Attach DePT far from its start; returns the built method."""
    method = DePT(**{"tokens": M, "r": R, "length": S, **options})
    return randomised(inlay.adapt(model, method, name=name, head=None), seed=seed).levels[0].method


def changed(model: nn.Module, method: Any, x: Tensor) -> Tensor:
    """[P; E(x) + α/√r · A B], without padding."""
    AB = method.A @ method.B
    with inlay.disabled(model):
        E = model.get_input_embeddings()(x)
    return torch.cat([method.P.expand(len(x), -1, -1), E + 8 / R**0.5 * AB[: x.shape[1]]], 1)


def by_hand(model: nn.Module, method: Any, x: Tensor) -> Any:
    embeds = changed(model, method, x)
    with inlay.disabled(model):
        return model(inputs_embeds=embeds)


# ------------------------------------------------------------------------------------------------ the equation
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon-alibi", "bloom", "opt"])
def test_a_decoder(name: str) -> None:
    model, x = decoder(name), ids(2, 9)
    base = model(x).logits
    method = adapted(model)
    out = model(x).logits
    close(out, by_hand(model, method, x).logits[:, M:])
    with torch.no_grad():
        method.B.zero_()
    prompted = model(x).logits
    assert not torch.allclose(out, prompted, atol=1e-2)
    assert not torch.allclose(prompted, base, atol=1e-2)
    close(model(inputs_embeds=model.get_input_embeddings()(x)).logits, prompted)


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet"])
def test_an_encoder(name: str) -> None:
    model, x = classifier(name), ids(2, 9)
    method = adapted(model, keep=True)
    kept = model(x).logits
    with inlay.disabled(model):
        E = model.get_input_embeddings()(x)
    close(model(inputs_embeds=E).logits, kept)  # what the caller embeds is changed alike
    if name == "bert":
        close(kept, by_hand(model, method, x).logits)


def test_an_encoder_decoder_changes_what_its_encoder_reads() -> None:
    model, x, y = seq2seq("t5"), ids(2, 9), ids(2, 5, seed=4)
    method = adapted(model)
    embeds = changed(model, method, x)
    with inlay.disabled(model):
        hand = model(inputs_embeds=embeds, decoder_input_ids=y).logits
    close(model(x, decoder_input_ids=y).logits, hand)
    tokens, logits = generated(model, padded(ROWS, "right"))
    for i, row in enumerate(ROWS):
        close(logits[i], model(row[None], decoder_input_ids=tokens[i : i + 1]).logits[0, :-1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    model = decoder(name)
    adapted(model)
    batch = padded(ROWS, side)
    if name in ABSOLUTE and side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    out = model(**batch).logits
    for i, row in enumerate(ROWS):
        close(out[i][batch["attention_mask"][i].bool()], model(row[None]).logits[0])


# ------------------------------------------------------------------------------------------------ generation
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    model, batch = decoder(name), padded(ROWS, "left")
    adapted(model)
    tokens, logits = generated(model, batch)
    same_without_cache(model, ROWS, tokens, logits)
    found = [model.generate(**batch, **GREEDY, num_beams=3, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found)


def test_a_conversation_goes_on_from_its_cache() -> None:
    model, x = decoder("llama"), ids(1, 9)
    adapted(model)
    first = model(x[:, :4], use_cache=True)
    rest = model(x[:, 4:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, rest.logits], 1), model(x).logits)


def test_more_tokens_than_it_reaches_are_refused() -> None:
    model, batch = decoder("llama"), padded(ROWS, "left")
    adapted(model, length=9)
    assert model(**batch).logits.shape == (2, 9, 60)
    with pytest.raises(AdapterError, match="reaches 9 tokens and was given 10"):
        model(ids(1, 10))
    with pytest.raises(AdapterError, match="length="):
        model.generate(**batch, **GREEDY)
    with pytest.raises(SiteError, match="PromptTuning needs no count"):
        inlay.adapt(decoder("mamba"), DePT())


# ------------------------------------------------------------------------------------------------ other adapters
@pytest.mark.parametrize("how", ["cached", "whole"])
def test_rows_of_their_own(how: str) -> None:
    model, batch = decoder("llama"), padded([*ROWS, *ROWS], "left")
    adapted(model, "a")
    adapted(model, "b", tokens=5, r=1, seed=8)
    randomised(inlay.adapt(model, PromptTuning(tokens=2), name="c"), seed=9)
    names = ["a", None, "b", "c"]
    for given in (batch, {"input_ids": ids(4, 9)}):
        with inlay.route(model, names):
            out = generated(model, {"attention_mask": torch.ones(4, 9), **given})[1] if how == "cached" else None
            out = model(**given).logits if out is None else out
        for i, which in enumerate(names):
            inlay.use(model, *([which] if which else []))
            row = {key: value[i : i + 1] for key, value in given.items()}
            if how == "cached":
                close(out[i], generated(model, {"attention_mask": torch.ones(1, 9), **row})[1][0])
                continue
            real = row.get("attention_mask", torch.ones(1, 9))[0].bool()
            close(out[i][real], model(**row).logits[0][real])


def test_two_changes_add_up() -> None:
    model, x = decoder("llama"), ids(2, 9)
    a, b = adapted(model, "a"), adapted(model, "b", seed=8)
    inlay.use(model, "a", "b")
    out = model(x).logits
    with inlay.disabled(model):
        E = model.get_input_embeddings()(x)
    E = E + 8 / R**0.5 * (a.A @ a.B + b.A @ b.B)[:9]
    embeds = torch.cat([a.P.expand(2, -1, -1), b.P.expand(2, -1, -1), E], 1)
    with inlay.disabled(model):
        close(out, model(inputs_embeds=embeds).logits[:, 2 * M :])


def test_with_weight_methods_beside_it() -> None:
    model, x = decoder("llama"), ids(2, 9)
    adapter = randomised(inlay.adapt(model, [DePT(tokens=M, r=R, length=S), LoRA(r=2).on("embed")]), scale=0.3)
    levels = {type(level.method): level.method for level in adapter.levels}
    out = model(x).logits
    inlay.use(model)
    head = model.lm_head.weight
    assert head is not model.model.embed_tokens.weight
    with torch.no_grad():
        model.model.embed_tokens.weight += levels[LoRA].delta().dense().T
    close(out, by_hand(model, levels[DePT], x).logits[:, M:])


# ------------------------------------------------------------------------------------------------ engines, life
def test_compiled_whole_it_gives_the_same() -> None:
    model, x = classifier("bert"), ids(2, 9)
    adapted(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(x).logits, model(x).logits)


def test_checkpointing_gives_the_same_gradients() -> None:
    model, batch = decoder("llama"), padded(ROWS, "left")
    method = adapted(model)
    model.train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in method.parameters()])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        assert a.abs().sum() > 0
        close(a, b)


def test_it_starts_as_a_prompt() -> None:
    model, x = decoder("llama"), ids(2, 9)
    (level,) = inlay.adapt(model, DePT(tokens=M, r=R, length=S, init="text", text_ids=[5, 9])).levels
    method = level.method
    assert torch.equal(method.P, model.model.embed_tokens.weight[[5, 9, 5]])
    assert method.A.abs().max() <= R**-0.5
    assert 0.2 < method.A.std() * R**0.5 < 1
    assert not method.B.any()
    out = model(x).logits
    inlay.detach(model)
    inlay.adapt(model, PromptTuning(tokens=M, init="text", text_ids=[5, 9]))
    assert torch.equal(model(x).logits, out)
