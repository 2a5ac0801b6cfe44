"""LongLoRA: shifted sparse attention against dense masks and the official algorithm, and what the paper states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import inlay
from inlay.core.active import attached
from inlay.core.errors import AdapterError, MergeError, OptionError, RouteError, SiteError
from inlay.core.method import Method
from inlay.methods import Full, LongLoRA, LoRA, NormTuning, PrefixTuning, PromptTuning

VOCABULARY, N = 50, 16


def decoder(kind: str = "llama", **options: object) -> nn.Module:
    """Two layers, 6 heads on 2 of keys: half of the heads does not end where heads share keys."""
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, **options,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def tokens(rows: int = 2, n: int = N, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, n), generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module, **options: object) -> nn.Module:
    """The model with LongLoRA, every trained tensor moved, in training mode."""
    return adapted(model, **options).model.train()


def adapted(model: nn.Module, **options: object) -> inlay.Adapter:
    adapter = inlay.adapt(model, LongLoRA(r=4, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapter


def logits(model: nn.Module, ids: Tensor, **given: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **given).logits


# ---------------------------------------------------------------------- oracles, dense
def allowed(n: int, G: int, shift: int) -> Tensor:
    """Which keys a query sees: causal, and in the same group of G tokens, the first of `shift` tokens."""
    group = torch.div(torch.arange(n) - shift, G, rounding_mode="floor")
    return (group[:, None] == group[None]) & torch.ones(n, n).tril().bool()


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = (q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v.double()


def dense(q: Tensor, k: Tensor, v: Tensor, G: int) -> Tensor:
    """S²-Attn without the leak, by masks."""
    half, n = q.shape[1] // 2, q.shape[2]
    first = masked(q[:, :half], k[:, :half], v[:, :half], allowed(n, G, 0))
    return torch.cat([first, masked(q[:, half:], k[:, half:], v[:, half:], allowed(n, G, G // 2))], 1)


def official(q: Tensor, k: Tensor, v: Tensor, G: int) -> Tensor:
    """The algorithm as published in code: roll the second half by −G/2, attend in groups of G, roll back."""
    half, n = q.shape[1] // 2, q.shape[2]
    q, k, v = (torch.cat([t[:, :half], t[:, half:].roll(-(G // 2), 2)], 1) for t in (q, k, v))
    y = masked(q, k, v, allowed(n, G, 0))
    return torch.cat([y[:, :half], y[:, half:].roll(G // 2, 2)], 1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def heads(n: int, count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(2, count, n, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize(("n", "groups"), [(16, 4), (32, 4), (15, 4), (7, 3), (3, 4), (1, 4), (16, 1), (10, 10)])
def test_attention_is_the_dense_one(n: int, groups: int) -> None:
    q, k, v = heads(n)
    G = -(-n // groups)
    expected = masked(q, k, v, torch.ones(n, n).tril().bool()) if n == G else dense(q, k, v, G)
    torch.testing.assert_close(LongLoRA(groups=groups).attend(causal, q, k, v), expected)


@pytest.mark.parametrize(("n", "groups"), [(16, 4), (32, 4), (24, 2), (12, 6)])
def test_leak_is_the_official_algorithm(n: int, groups: int) -> None:
    q, k, v = heads(n)
    found = LongLoRA(groups=groups, leak=True).attend(causal, q, k, v)
    torch.testing.assert_close(found, official(q, k, v, n // groups))


def test_paths_differ_at_the_first_half_group_of_shifted_heads_alone() -> None:
    """N = 32, G = 8, as stated of the two official implementations."""
    q, k, v = heads(32, 6)
    here, there = (LongLoRA(leak=leak).attend(causal, q, k, v) for leak in (False, True))
    gap = (here - there).abs().amax((0, 3)) > 1e-9
    assert not gap[:3].any()
    assert gap[3:, :4].all()
    assert not gap[3:, 4:].any()


# ---------------------------------------------------------------------- in a model
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_nothing_leaks_by_default(kind: str) -> None:
    """Changing the last token changes the last output alone, as in any decoder."""
    model = trained(decoder(kind, **({"sliding_window": None} if kind == "mistral" else {})))
    ids, other = tokens(), tokens()
    other[:, -1] = other[:, -1] % (VOCABULARY - 1) + 1
    gap = (logits(model, ids) - logits(model, other)).abs().amax((0, 2))
    assert gap[-1] > 1e-3
    assert (gap[:-1] == 0).all()


def test_official_behaviour_leaks() -> None:
    model = trained(decoder(), leak=True)
    ids, other = tokens(), tokens()
    other[:, -1] = other[:, -1] % (VOCABULARY - 1) + 1
    gap = (logits(model, ids) - logits(model, other)).abs().amax((0, 2))
    assert (gap[:2] > 1e-6).all(), "the first half group attends to the end"


def test_training_differs_from_evaluation_and_one_group_does_not() -> None:
    ids = tokens()
    for groups, same in ((4, False), (1, True)):
        model = trained(decoder(), groups=groups)
        training, evaluation = logits(model, ids), logits(model.eval(), ids)
        assert torch.allclose(training, evaluation, atol=1e-5) == same


def test_least_makes_short_sequences_one_group() -> None:
    model = trained(decoder(), least=N)
    torch.testing.assert_close(logits(model, tokens()), logits(model.eval(), tokens()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_evaluation_is_full_attention(implementation: str) -> None:
    """In evaluation the model is the base with merged matrices, embeddings and norms, on longer inputs too."""
    model = trained(decoder()).eval()
    model.set_attn_implementation(implementation)
    ids = tokens(n=40)
    plain = decoder().eval()
    plain.set_attn_implementation(implementation)
    for level in attached(model).levels("default"):
        module, built = plain.get_submodule(level.site.path), level.method
        with torch.no_grad():
            if isinstance(built, LoRA):
                module.weight += built.alpha / built.r * built.B @ built.A
            elif isinstance(built, Full | NormTuning):
                module.weight = nn.Parameter(built.value.clone())  # the output layer keeps its own
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), atol=1e-5, rtol=1e-4)


def test_a_model_equals_the_oracle() -> None:
    """A whole forward in training, with the attention replaced by the dense one."""
    model = trained(decoder())
    found = logits(model, tokens())
    mount = attached(model).state.tokens["model.layers.0.self_attn"]
    built = mount.methods(["default"])[0]
    built.__dict__["attend"] = lambda causal, q, k, v: dense(q, k, v, N // 4).to(q)
    torch.testing.assert_close(found, logits(model, tokens()), atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------- padding and packing
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padded_rows_equal_unpadded_ones(side: str, leak: bool, implementation: str) -> None:
    model = trained(decoder(), leak=leak)
    model.set_attn_implementation(implementation)
    lengths, ids = (12, 16, 8), tokens(3)
    keep = torch.stack([torch.arange(N) < n for n in lengths])
    keep = keep.flip(1) if side == "left" else keep
    mask, places = keep.long(), (keep.cumsum(1) - 1).clamp(min=0)
    padded = logits(model, ids.masked_fill(~keep, 0), attention_mask=mask, position_ids=places)
    for row, n in enumerate(lengths):
        alone = logits(model, ids[row][keep[row]][None])
        torch.testing.assert_close(padded[row][keep[row]], alone[0], atol=1e-5, rtol=1e-4)
        assert n == alone.shape[1]


def test_a_mask_without_padding_changes_nothing() -> None:
    model = trained(decoder())
    assert torch.equal(logits(model, tokens()), logits(model, tokens(), attention_mask=torch.ones(2, N).long()))


@pytest.mark.parametrize("bounds", [False, True])
def test_packed_sequences_equal_unpacked_ones(bounds: bool) -> None:
    """Told by position ids that begin again, or by cu_seq_lens as collators for flash attention give them."""
    model, lengths = trained(decoder()), (8, 5, 12)
    parts = [tokens(1, n, seed=n) for n in lengths]
    given: dict = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    if bounds:
        ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
        given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
    packed = logits(model, torch.cat(parts, 1), **given)
    alone = torch.cat([logits(model, part) for part in parts], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_padding_gets_no_gradient_from_real_tokens() -> None:
    model, ids = trained(decoder()), tokens()
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    gradients = [p.grad.clone() for p in model.inlay.parameters()]
    model.zero_grad()
    model(input_ids=ids[:, :12], labels=ids[:, :12]).loss.backward()
    for a, p in zip(gradients, model.inlay.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-3)


# ---------------------------------------------------------------------- training
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, ids = trained(decoder()), tokens()
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    found = []
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.inlay.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_in_one_graph() -> None:
    model, ids = trained(decoder()), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, logits(model, ids))
    torch._dynamo.reset()


def test_count_of_the_paper() -> None:
    """Llama-2-7B at r = 8: LoRA on four matrices 8,388,608, embeddings 131,072,000, norms 266,240."""
    from inlay.plan import plan

    whole = plan("llama-7b", LongLoRA(), memory=False).adapter_parameters
    assert whole == 8_388_608 + 32_000 * 4096 + 266_240
    assert plan("llama-7b", LongLoRA(embeddings=False, norms=False), memory=False).adapter_parameters == 8_388_608
    assert plan("llama-7b", LongLoRA(r=0, embeddings=False), memory=False).adapter_parameters == 266_240


def test_the_file_holds_norms_and_embeddings(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    adapter, ids = adapted(decoder(), stretch=2.0), tokens(n=40)
    training, evaluation = logits(adapter.model.train(), ids), logits(adapter.model.eval(), ids)
    adapter.save(str(tmp_path))
    names = set(load_file(tmp_path / "adapter.safetensors"))
    assert {"model.embed_tokens.weight.value", "model.norm.weight.value"} <= names
    assert len([name for name in names if "norm" in name]) == 5
    fresh = decoder()
    inlay.load(fresh, str(tmp_path))
    assert torch.equal(evaluation, logits(fresh.eval(), ids))
    assert torch.equal(training, logits(fresh.train(), ids))


# ---------------------------------------------------------------------- positions
def test_stretch_is_transformers_linear_scaling() -> None:
    ids = tokens(n=40)
    model = decoder()
    inlay.adapt(model, LongLoRA(stretch=2.0))
    scaled = decoder(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    found = logits(model.eval(), ids)
    torch.testing.assert_close(found, logits(scaled.eval(), ids))
    with inlay.disabled(model):
        assert torch.equal(logits(model, ids), logits(decoder().eval(), ids))
    inlay.adapt(model, LongLoRA(stretch=4.0), name="other")
    with inlay.route(model, ["default", None]):
        routed = logits(model, ids)
    torch.testing.assert_close(routed[:1], found[:1])
    torch.testing.assert_close(routed[1:], logits(decoder().eval(), ids)[1:])
    inlay.detach(model)
    assert torch.equal(logits(model, ids), logits(decoder().eval(), ids))


def test_merging_writes_the_stretch_into_the_configuration(tmp_path: Path) -> None:
    from inlay.core.export import export

    model = trained(decoder(), stretch=2.0).eval()
    ids, before = tokens(n=40), dict(model.config.rope_parameters)
    adapted = logits(model, ids)
    inlay.merge(model)
    torch.testing.assert_close(logits(model, ids), adapted, atol=1e-5, rtol=1e-4)
    assert model.config.rope_parameters["factor"] == 2.0
    inlay.unmerge(model)
    assert model.config.rope_parameters == before
    assert torch.equal(logits(model, ids), adapted)
    export(model, tmp_path / "merged")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(opened, ids), adapted, atol=1e-5, rtol=1e-4)
    inlay.detach(model)
    assert model.config.rope_parameters == before


def test_a_stretch_that_no_configuration_can_say_is_not_merged() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    model = trained(decoder(rope_parameters=rope), stretch=2.0).eval()
    adapted = logits(model, tokens())
    with pytest.raises(MergeError, match="of type 'llama3' cannot say"):
        inlay.merge(model)
    assert torch.equal(logits(model, tokens()), adapted)


# ---------------------------------------------------------------------- refusals
def test_what_it_refuses() -> None:
    with pytest.raises(OptionError, match="groups"):
        LongLoRA(groups=0)
    with pytest.raises(SiteError, match="brings LoRA, Full, NormTuning with it"):
        inlay.adapt(decoder(), LongLoRA(), where=["attn.q"])
    gpt2 = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2)
    )
    with pytest.raises(SiteError, match="stretches rotary positions"):
        inlay.adapt(gpt2, LongLoRA(stretch=2.0))
    assert "inlay" not in gpt2._modules
    inlay.adapt(gpt2, LongLoRA())
    bart = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("bart", vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1,
                             encoder_attention_heads=2, decoder_attention_heads=2)
    )  # fmt: skip
    with pytest.raises(SiteError, match="BartDecoder attends to an encoder"):
        inlay.adapt(bart, LongLoRA().replace(r=0, embeddings=False, norms=False), "decoder.block")


@pytest.mark.parametrize("other", [PromptTuning(tokens=2), PrefixTuning(tokens=2)])
def test_virtual_tokens_are_not_trained_in_groups(other: Method) -> None:
    model = decoder()
    inlay.adapt(model, [LongLoRA(), other])
    logits(model.eval(), tokens())
    with pytest.raises(AdapterError, match="would not see the virtual tokens"):
        logits(model.train(), tokens())


def test_rows_are_routed_in_evaluation() -> None:
    model = decoder()
    inlay.adapt(model, LongLoRA())
    with inlay.route(model, ["default", None]), pytest.raises(RouteError, match="route rows after"):
        logits(model.train(), tokens())
    with inlay.route(model, ["default", None]):
        logits(model.eval(), tokens())


def test_generating_while_training_reads_the_cache_in_full() -> None:
    model = trained(decoder(), groups=1)
    ids = tokens()
    cache = model(input_ids=ids[:, :10], use_cache=True).past_key_values
    rest = model(input_ids=ids[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(rest, logits(model, ids)[:, 10:], atol=1e-5, rtol=1e-4)
