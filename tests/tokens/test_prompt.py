"""Prompt tuning against the base model given [P; X] by hand, with padding, caches, labels, routes and heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from token_models import (
    ABSOLUTE,
    DECODERS,
    ENCODERS,
    GREEDY,
    SEQ2SEQS,
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

import inlay
from inlay.core.errors import AdapterError, OptionError, RouteError, SiteError
from inlay.methods import LoRA, LoReFT, PrefixTuning, PromptTuning

P = 4
ROWS = [ids(9), ids(5, seed=2)]


def prompted(model: nn.Module, name: str = "default", seed: int = 3, **options: Any) -> Tensor:
    """Attach a prompt far from its start; returns P (p, d)."""
    adapter = randomised(inlay.adapt(model, PromptTuning(**{"tokens": P, **options}), name=name, head=None), seed=seed)
    return adapter.levels[0].method.P.detach().clone()


def by_hand(model: nn.Module, prompt: Tensor, x: Tensor, **more: Any) -> Any:
    """The base model on [P; E(x)]."""
    with inlay.disabled(model):
        embeds = torch.cat([prompt.expand(len(x), -1, -1), model.get_input_embeddings()(x)], 1)
        return model(inputs_embeds=embeds, **more)


# ------------------------------------------------------------------------------------------------ decoders
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_reads_the_prompt_first(name: str) -> None:
    model, x = decoder(name), ids(2, 9)
    base = model(x).logits
    prompt = prompted(model)
    out = model(x, labels=x)
    hand = by_hand(model, prompt, x).logits[:, P:]
    close(out.logits, hand)
    assert not torch.allclose(out.logits, base, atol=1e-2)
    loss = nn.functional.cross_entropy(hand[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    close(out.loss, loss)
    with inlay.disabled(model):
        assert torch.equal(model(x).logits, base)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_padding_changes_nothing_in_a_decoder(name: str, side: str) -> None:
    model = decoder(name)
    prompted(model)
    batch = padded(ROWS, side)
    if name in ABSOLUTE and side == "left":  # the base itself needs them there, and `generate` makes them
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    out = model(**batch).logits
    for i, row in enumerate(ROWS):
        real = batch["attention_mask"][i].bool()
        close(out[i][real], model(row[None]).logits[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon-alibi", "bloom", "opt", "mamba"])
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    model = decoder(name)
    batch = padded(ROWS, "left")
    base = generated(model, batch)[1]
    prompted(model)
    tokens, logits = generated(model, batch)
    assert not torch.allclose(logits, base, atol=1e-2)
    same_without_cache(model, ROWS, tokens, logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}])
def test_beams_and_samples_are_those_without_a_cache(name: str, how: dict[str, Any]) -> None:
    model = decoder(name)
    prompted(model)
    found = []
    for cache in (True, False):
        torch.manual_seed(5)
        found.append(model.generate(**padded(ROWS, "left"), use_cache=cache, **{**GREEDY, **how}))
    assert torch.equal(*found)


def test_a_conversation_goes_on_from_its_cache() -> None:
    model, x = decoder("llama"), ids(1, 9)
    prompted(model)
    first = model(x[:, :4], use_cache=True)
    rest = model(x[:, 4:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, rest.logits], 1), model(x).logits)


def test_positions_embeddings_and_types_given_by_the_caller() -> None:
    model, x = decoder("gpt2"), ids(2, 9)
    prompt = prompted(model)
    positions = torch.arange(9)[None] + 20
    hand = by_hand(model, prompt, x, position_ids=torch.arange(9 + P)[None] + 20).logits[:, P:]
    close(model(x, position_ids=positions).logits, hand)
    close(model(inputs_embeds=model.get_input_embeddings()(x)).logits, model(x).logits)
    close(model.transformer(x, None, torch.ones_like(x)).last_hidden_state, model.transformer(x).last_hidden_state)


def test_hidden_states_and_attentions_have_the_users_queries() -> None:
    model, x = decoder("llama", attention="eager"), ids(2, 9)
    prompted(model)
    out = model(x, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in out.hidden_states] == [(2, 9, 32)] * 3
    assert [a.shape for a in out.attentions] == [(2, 4, 9, 9 + P)] * 2
    assert torch.allclose(out.attentions[0].sum(-1), torch.ones(2, 4, 9), atol=1e-6)
    plain = model.model(x, return_dict=False, output_hidden_states=True)
    assert plain[0].shape == (2, 9, 32)


# ------------------------------------------------------------------------------------------------ encoders
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_pools_the_users_first_token(name: str) -> None:
    model, x = classifier(name), ids(2, 9)
    prompt = prompted(model)
    backbone = model.get_submodule(model.base_model_prefix)
    with inlay.disabled(model):
        embeds = torch.cat([prompt.expand(2, -1, -1), model.get_input_embeddings()(x)], 1)
        hidden = backbone(inputs_embeds=embeds).last_hidden_state[:, P:]
    close(backbone(x).last_hidden_state, hidden)
    logits = model(**padded(ROWS, "right")).logits
    for i, row in enumerate(ROWS):
        close(logits[i], model(row[None]).logits[0])


def test_the_pooler_sees_the_true_first_token() -> None:
    model, x = classifier("bert"), ids(2, 9)
    prompt = prompted(model)
    types = torch.tensor([[0] * 4 + [1] * 5]).expand(2, -1)
    out = model(x, token_type_ids=types).logits
    with inlay.disabled(model):
        embeds = torch.cat([prompt.expand(2, -1, -1), model.get_input_embeddings()(x)], 1)
        long = torch.cat([torch.zeros(2, P, dtype=torch.long), types], 1)
        hidden = model.bert(inputs_embeds=embeds, token_type_ids=long).last_hidden_state
        hand = model.classifier(model.bert.pooler(hidden[:, P:]))
        kept = model.classifier(model.bert.pooler(hidden))
    close(out, hand)
    inlay.detach(model)
    prompted(model, keep=True)
    close(model(x, token_type_ids=types).logits, kept)
    assert model.bert(x).last_hidden_state.shape == (2, 9 + P, 32)


def test_roberta_counts_positions_over_padding_as_before() -> None:
    model = classifier("roberta")
    prompted(model)
    batch = padded(ROWS, "left")
    hidden = model.roberta(**batch).last_hidden_state
    for i, row in enumerate(ROWS):
        close(hidden[i][batch["attention_mask"][i].bool()], model.roberta(row[None]).last_hidden_state[0])


# ------------------------------------------------------------------------------------------------ encoder-decoders
@pytest.mark.parametrize("name", SEQ2SEQS)
def test_the_decoder_attends_to_the_encoders_prompt(name: str) -> None:
    model, x, y = seq2seq(name), ids(2, 9), ids(2, 5, seed=4)
    base = model(x, decoder_input_ids=y).logits
    prompt = prompted(model)
    hand = by_hand(model, prompt, x, decoder_input_ids=y).logits
    close(model(x, decoder_input_ids=y).logits, hand)
    assert not torch.allclose(hand, base, atol=1e-2)
    labelled = model(x, labels=y)
    assert labelled.logits.shape == (2, 5, 60)
    logits = model(**padded(ROWS, "right"), decoder_input_ids=y[:1].expand(2, -1)).logits
    for i, row in enumerate(ROWS):
        close(logits[i], model(row[None], decoder_input_ids=y[:1]).logits[0])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_generates_with_its_cache(name: str, beams: int) -> None:
    model, batch = seq2seq(name), padded(ROWS, "right")
    base = generated(model, batch)[1]
    prompted(model)
    out = model.generate(**batch, **GREEDY, num_beams=beams)
    for i, row in enumerate(ROWS):
        whole = {"attention_mask": torch.ones(1, len(row)), "use_cache": False}
        assert out[i].tolist() == model.generate(row[None], **GREEDY, num_beams=beams, **whole)[0].tolist()
    tokens, logits = generated(model, batch)
    assert not torch.allclose(logits, base, atol=1e-2)
    close(logits, model(**batch, decoder_input_ids=tokens).logits[:, :-1])


def test_t5_with_left_padding() -> None:
    model, y = seq2seq("t5"), ids(1, 5, seed=4)
    prompted(model)
    logits = model(**padded(ROWS, "left"), decoder_input_ids=y.expand(2, -1)).logits
    close(logits[1], model(ROWS[1][None], decoder_input_ids=y).logits[0])


def test_a_prompt_in_the_decoder() -> None:
    model, x, y = seq2seq("t5"), ids(2, 9), ids(2, 5, seed=4)
    adapter = randomised(inlay.adapt(model, PromptTuning(tokens=P), where="decoder.embed"))
    prompt = adapter.levels[0].method.P.detach()
    with inlay.disabled(model):
        embeds = torch.cat([prompt.expand(2, -1, -1), model.decoder.embed_tokens(y)], 1)
        hand = model(x, decoder_inputs_embeds=embeds).logits[:, P:]
    close(model(x, decoder_input_ids=y).logits, hand)


# ------------------------------------------------------------------------------------------------ several adapters
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt", "mamba"])
def test_rows_with_prompts_of_different_lengths_or_none(name: str) -> None:
    model = decoder(name)
    prompted(model, "a")
    prompted(model, "b", tokens=2, seed=8)
    names = ["a", None, "b", "b"]
    batch = padded([*ROWS, *ROWS], "left")
    if name in ABSOLUTE | {"opt"}:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with inlay.route(model, names):
        out = model(**batch).logits
        tokens, logits = generated(model, batch)
        beams = model.generate(**batch, **GREEDY, num_beams=2)
    for i, which in enumerate(names):
        inlay.use(model, *([which] if which else []))
        row = [*ROWS, *ROWS][i]
        close(out[i][batch["attention_mask"][i].bool()], model(row[None]).logits[0])
        same_without_cache(model, [row], tokens[i : i + 1], logits[i : i + 1])
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **GREEDY, num_beams=2)
        assert beams[i, -4:].tolist() == alone[0, -4:].tolist()


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_rows_of_an_encoder(name: str) -> None:
    model = classifier(name)
    prompted(model, "a")
    prompted(model, "b", tokens=2, seed=8)
    names = ["a", None, "b", "b"]
    x = ids(4, 9)
    with inlay.route(model, names):
        out = model(x).logits
    for i, which in enumerate(names):
        inlay.use(model, *([which] if which else []))
        close(out[i], model(x[i : i + 1]).logits[0])


def test_rows_of_an_encoder_decoder() -> None:
    model, y = seq2seq("t5"), ids(4, 5, seed=4)
    prompted(model, "a")
    prompted(model, "b", tokens=2, seed=8)
    names = ["a", None, "b", "b"]
    batch = padded([*ROWS, *ROWS], "right")
    with inlay.route(model, names):
        out = model(**batch, decoder_input_ids=y).logits
        logits = generated(model, batch)[1]
    for i, which in enumerate(names):
        inlay.use(model, *([which] if which else []))
        row = {key: value[i : i + 1] for key, value in batch.items()}
        close(out[i], model(**row, decoder_input_ids=y[i : i + 1]).logits[0])
        close(logits[i], generated(model, row)[1][0])


def test_two_prompts_stand_in_their_order() -> None:
    model, x = decoder("llama"), ids(2, 9)
    a, b = prompted(model, "a"), prompted(model, "b", tokens=2, seed=8)
    inlay.use(model, "a", "b")
    close(model(x).logits, by_hand(model, torch.cat([a, b]), x).logits[:, P + 2 :])
    inlay.use(model, "b")
    close(model(x).logits, by_hand(model, b, x).logits[:, 2:])


def test_a_model_that_takes_no_positions_routes_prompts_of_one_length_only() -> None:
    model, x, y = seq2seq("bart"), ids(2, 9), ids(2, 5, seed=4)
    prompted(model, "a")
    prompted(model, "b", seed=8)
    prompted(model, "c", tokens=2)
    with inlay.route(model, ["a", "b"]):
        out = model(x, decoder_input_ids=y).logits
    inlay.use(model, "b")
    close(out[1], model(x[1:], decoder_input_ids=y[1:]).logits[0])
    with inlay.route(model, ["a", "c"]), pytest.raises(RouteError, match="prompts of one length"):
        model(x, decoder_input_ids=y)


# ------------------------------------------------------------------------------------------------ with other methods
def test_with_a_weight_method_beside_it() -> None:
    model, x = decoder("llama"), ids(2, 9)
    adapter = randomised(inlay.adapt(model, [PromptTuning(tokens=P), LoRA(r=2).on("embed", "attn.q")]), scale=0.3)
    levels = {level.site.key: level.method for level in adapter.levels}
    prompt, table = levels["model.prompt"].P, levels["model.embed_tokens"]
    out = model(x).logits
    prefix = [key for key in levels if "q_proj" in key]
    with torch.no_grad(), inlay.disabled(model):
        for key in prefix:
            model.get_submodule(key).weight += levels[key].delta().dense()
        embeds = model.get_input_embeddings()(x) + nn.functional.embedding(x, table.delta().dense().T)
        hand = model(inputs_embeds=torch.cat([prompt.expand(2, -1, -1), embeds], 1)).logits[:, P:]
    close(out, hand)


def test_methods_that_select_positions_count_the_users_tokens() -> None:
    model, batch = decoder("llama"), padded(ROWS, "left")
    prompted(model, "prompt")
    randomised(inlay.adapt(model, LoReFT(r=2, positions="f1").on("block[1]"), name="edit"))
    found: list[Tensor] = []
    for names in (["prompt"], ["prompt", "edit"]):
        inlay.use(model, *names)
        handle = model.model.layers[1].register_forward_hook(lambda m, a, out: found.append(out.detach()))
        model(**batch)
        handle.remove()
    edited = (found[0] - found[1]).abs().sum(2).gt(1e-6)
    assert [row.nonzero().flatten().tolist() for row in edited] == [[P], [P + 4]]


def test_a_prompt_cannot_be_merged() -> None:
    model = decoder("llama")
    adapter = inlay.adapt(model, [LoRA(), PromptTuning()])
    with pytest.raises(inlay.core.errors.MergeError, match="PromptTuning"):
        adapter.merge()


# ------------------------------------------------------------------------------------------------ engines
@pytest.mark.parametrize("kind", [decoder, classifier])
def test_compiled_whole_it_gives_the_same(kind: Any) -> None:
    model = kind("llama" if kind is decoder else "bert")
    prompted(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = padded(ROWS, "right")
    close(compiled(**batch).logits, model(**batch).logits)


def test_checkpointing_gives_the_same_gradient() -> None:
    model, batch = decoder("llama"), padded(ROWS, "left")
    prompted(model)
    trained = next(p for n, p in model.named_parameters() if n.startswith("inlay."))
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append(trained.grad.clone())
        trained.grad = None
    assert gradients[0].abs().sum() > 0
    close(*gradients)


def test_half_precision_base_and_full_precision_prompt() -> None:
    model = decoder("llama").bfloat16()
    inlay.adapt(model, PromptTuning(tokens=P))
    out = model(ids(2, 9))
    assert out.logits.dtype == torch.bfloat16
    out.logits.float().sum().backward()
    trained = next(p for n, p in model.named_parameters() if n.startswith("inlay."))
    assert trained.dtype == trained.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ life of an adapter
def test_nothing_is_left_after_detaching() -> None:
    model, x = classifier("bert"), ids(2, 9)
    keys, base = list(model.state_dict()), model(x).logits
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    inlay.adapt(model, PromptTuning())
    inlay.detach(model)
    assert list(model.state_dict()) == keys
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()} == hooks
    assert torch.equal(model(x).logits, base)


@pytest.mark.parametrize("kind", [decoder, classifier, seq2seq])
def test_saved_and_loaded_it_is_the_same_to_the_bit(kind: Any, tmp_path: Any) -> None:
    name = {decoder: "gpt2", classifier: "roberta", seq2seq: "t5"}[kind]
    model, x = kind(name), ids(2, 9)
    more = {"decoder_input_ids": ids(2, 5)} if kind is seq2seq else {}
    adapter = randomised(inlay.adapt(model, PromptTuning(tokens=P)))
    adapter.save(tmp_path)
    out = model(x, **more).logits
    other = kind(name)
    loaded = inlay.load(other, tmp_path)
    assert torch.equal(other(x, **more).logits, out)
    assert loaded.adapter_parameters == adapter.adapter_parameters == P * 32
    wrong = kind(name)
    with torch.no_grad():
        wrong.get_input_embeddings().weight.add_(1.0)
    with pytest.raises(inlay.core.errors.CheckpointError, match="another base"):
        inlay.load(wrong, tmp_path)


def test_the_count_and_the_start() -> None:
    model = decoder("llama")
    table = model.get_input_embeddings().weight
    adapter = inlay.adapt(model, PromptTuning(tokens=7))
    (level,) = adapter.levels
    assert adapter.adapter_parameters == level.method.count(level.site) == 7 * 32
    assert not level.method.starts_at_base
    assert all((table == row).all(1).any() for row in level.method.P)
    inlay.detach(model)
    (level,) = inlay.adapt(model, PromptTuning(tokens=7, init="text", text_ids=[5, 9, 4])).levels
    assert torch.equal(level.method.P, table[[5, 9, 4, 5, 9, 4, 5]])
    inlay.detach(model)
    (level,) = inlay.adapt(model, PromptTuning(tokens=7, init="random", scale=0.25)).levels
    assert 0.2 < level.method.P.abs().max() <= 0.25


class Words:
    """A tokenizer of the alphabet."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) - ord("a") + 3 for letter in text]}


def test_a_text_is_tokenised_without_special_tokens() -> None:
    method = PromptTuning(tokens=5).with_text("abc", Words())
    assert (method.init, method.text, method.text_ids) == ("text", "abc", [3, 4, 5])
    assert inlay.core.method.method_from(method.specification()).text_ids == [3, 4, 5]


# ------------------------------------------------------------------------------------------------ refusals
def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(OptionError, match="needs token ids"):
        PromptTuning(init="text", text="Is it a question?")
    with pytest.raises(OptionError, match="for init='text'"):
        PromptTuning(text_ids=[3])
    with pytest.raises(OptionError, match="vocabulary has 60"):
        inlay.adapt(decoder("llama"), PromptTuning(init="text", text_ids=[3, 60]))
    with pytest.raises(OptionError, match="at least 1"):
        PromptTuning(tokens=0)


def test_models_without_input_embeddings_are_refused() -> None:
    vision = make(transformers.AutoModel, VISION)
    with pytest.raises(SiteError, match="takes none"):
        inlay.adapt(vision, PromptTuning())
    with pytest.raises(SiteError, match="unknown"):
        inlay.adapt(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), PromptTuning())
    assert "inlay" not in vision._modules


def test_places_that_are_no_input_are_refused() -> None:
    model = decoder("llama")
    with pytest.raises(SiteError, match="goes before the input embeddings"):
        inlay.adapt(model, [PromptTuning(), LoRA()], where="attn.q")
    with pytest.raises(SiteError, match="layers"):
        inlay.adapt(model, PromptTuning(), layers=[0])
    with pytest.raises(SiteError, match="causal"):
        inlay.adapt(model, PromptTuning(keep=True))
    assert "inlay" not in model._modules


def test_inputs_that_would_be_misread_are_refused() -> None:
    model, x = decoder("llama"), ids(1, 9)
    with torch.no_grad():
        cache = model(x[:, :4], use_cache=True).past_key_values
    prompted(model)
    with pytest.raises(AdapterError, match="filled by another adapter"):
        model(x[:, 4:], attention_mask=torch.ones(1, 9), past_key_values=cache)
    with pytest.raises(AdapterError, match="attention mask"):
        model(x, attention_mask=torch.zeros(1, 1, 9, 9))
    with pytest.raises(AdapterError, match="static cache"):
        model.generate(x, max_new_tokens=3, cache_implementation="static", disable_compile=True)
    encoder = classifier("bert")
    prompted(encoder, "a", keep=True)
    with inlay.route(encoder, ["a", None]), pytest.raises(RouteError, match="keep=True"):
        encoder(ids(2, 9))


def test_prefix_and_prompt_together() -> None:
    model, x = decoder("llama"), ids(2, 9)
    words = {"tokens": 3, "init": "text", "text_ids": [5, 6, 7]}
    inlay.adapt(model, [PrefixTuning(**words, shift=True), PromptTuning(tokens=P, init="text", text_ids=[9])])
    both = model(x).logits
    inlay.detach(model)
    inlay.adapt(model, PromptTuning(tokens=3 + P, init="text", text_ids=[5, 6, 7, 9, 9, 9, 9]))
    close(both, model(x).logits)
