"""Logits fusion against its equations, row by row, without caches and without padding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import inlay
from inlay.core.errors import FusionError, OptionError
from inlay.fusion.dynamic import Search, divergences
from inlay.fusion.rule import Pair
from inlay.methods import LoRA

WORDS, PAD = 29, 0


@cache
def template(kind: str, width: int, seed: int, words: int) -> nn.Module:
    torch.manual_seed(seed)
    config: dict[str, Any] = {"vocab_size": words, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        config |= {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "intermediate_size": 2 * width, "max_position_embeddings": 64}  # fmt: skip
    else:
        config |= {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **config))
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=1.5 * p.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def decoder(kind: str = "llama", width: int = 32, seed: int = 0, words: int = WORDS) -> nn.Module:
    return copy.deepcopy(template(kind, width, seed, words))


@pytest.fixture
def base() -> nn.Module:
    return decoder()


@pytest.fixture
def small() -> tuple[nn.Module, nn.Module]:
    """A tuned model and the same one untuned; of another architecture than the base, and narrower."""
    return decoder("gpt2", 16, 1), decoder("gpt2", 16, 2)


@pytest.fixture
def prompts() -> dict[str, Tensor]:
    """Three prompts of 5, 3 and 4 tokens, padded on the left."""
    ids, mask = torch.randint(3, WORDS, (3, 5)), torch.ones(3, 5, dtype=torch.long)
    for row, pads in ((1, 2), (2, 1)):
        ids[row, :pads], mask[row, :pads] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def alone(model: nn.Module, row: Tensor) -> Tensor:
    """Logits after one row without its padding, computed from its beginning."""
    return model(input_ids=row[int(row.eq(PAD).long().cumprod(0).sum()) :][None], use_cache=False).logits[0, -1]


class Plain:
    """A logits processor that computes z + α (z⁺ − z⁻) anew for every row."""

    def __init__(self, tuned: nn.Module, untuned: nn.Module, alpha: float) -> None:
        self.tuned, self.untuned, self.alpha = tuned, untuned, alpha

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [alone(self.tuned, row) - alone(self.untuned, row) for row in input_ids]
        return (scores + self.alpha * torch.stack(rows)).log_softmax(-1)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 10, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_generates_what_the_equation_says(way, base, small, prompts):
    options = {**WAYS[way], "max_new_tokens": 8, "output_scores": True, "return_dict_in_generate": True}
    fusion = inlay.fuse(base, inlay.Expert(*small, alpha=0.7))
    found = []
    runs: list[Callable[[], Any]] = [
        lambda: base.generate(**prompts, **options, logits_processor=[Plain(*small, 0.7)]),
        lambda: base.generate(**prompts, **options, logits_processor=[fusion]),
        lambda: base.generate(**prompts, **options, logits_processor=[fusion]),  # a cache that is full of the last call
        lambda: fusion.generate(**prompts, **options),
    ]
    for run in runs:
        torch.manual_seed(3)
        found.append(run())
    plain = base.generate(**prompts, **options)
    assert not torch.equal(plain.sequences, found[0].sequences)
    for other in found[1:]:
        assert torch.equal(other.sequences, found[0].sequences)
        for ours, expected in zip(other.scores, found[0].scores, strict=True):
            assert torch.allclose(ours, expected, atol=2e-4)


def test_reads_only_what_is_new(base, small, prompts):
    """Each expert sees the prompt once and then one token a step, however beams move."""
    seen: list[tuple[int, ...]] = []
    small[0].register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    inlay.fuse(base, inlay.Expert(*small)).generate(**prompts, num_beams=3, do_sample=False, min_new_tokens=5,
                                                    max_new_tokens=5)  # fmt: skip
    assert seen == [(9, 5), *[(9, 1)] * 4]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_add_is_the_base_token_for_token(way, base, small, prompts):
    options = {**WAYS[way], "max_new_tokens": 8}
    same = inlay.Expert(small[0], copy.deepcopy(small[0]), alpha=3.0)
    off = inlay.Expert(*small, alpha=0.0)
    found = []
    for processors in ([], [inlay.fuse(base, off)], [inlay.fuse(base, same)], [inlay.fuse(base, [same, off])]):
        torch.manual_seed(5)
        found.append(base.generate(**prompts, **options, logits_processor=processors))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_swapping_expert_and_anti_expert_turns_the_sign(base, small, prompts):
    there = inlay.fuse(base, inlay.Expert(*small, alpha=0.9)).log_probs(**prompts)
    back = inlay.fuse(base, inlay.Expert(*reversed(small), alpha=-0.9)).log_probs(**prompts)
    assert torch.allclose(there, back, atol=1e-5)
    away = inlay.fuse(base, inlay.Expert(*reversed(small), alpha=0.9)).log_probs(**prompts)
    z = base(**prompts).logits.log_softmax(-1)
    middle = 0.5 * (there + away)  # what one adds the other takes away
    real = prompts["attention_mask"].bool()
    assert torch.allclose(middle.log_softmax(-1)[real], positioned(base, prompts).log_softmax(-1)[real], atol=1e-4)
    assert not torch.allclose(there[real], z[real], atol=1e-2)


def positioned(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return model(**inputs, position_ids=places).logits


def test_log_probs_are_those_of_decoding(base, small, prompts):
    fusion = inlay.fuse(base, [inlay.Expert(*small, alpha=0.5), inlay.Expert(small[1], None, alpha=0.3)])
    out = fusion.generate(**prompts, do_sample=False, max_new_tokens=6, min_new_tokens=6, output_scores=True,
                          return_dict_in_generate=True)  # fmt: skip
    mask = torch.cat([prompts["attention_mask"], torch.ones(3, 6, dtype=torch.long)], 1)
    whole = fusion.log_probs(out.sequences, mask)[:, 4:-1]
    steps = torch.stack(out.scores, 1)
    kept = steps.isfinite()  # the end of text is forbidden by min_new_tokens
    renormalised = whole.masked_fill(~kept, -torch.inf).log_softmax(-1)
    assert torch.allclose(renormalised[kept], steps[kept], atol=2e-4)
    assert torch.allclose(whole.exp().sum(-1), torch.ones(3, 6), atol=1e-5)


def test_several_experts_add_up_and_share_their_base(base, small, prompts):
    third = decoder("gpt2", 16, 7)
    fusion = inlay.fuse(base, [inlay.Expert(small[0], small[1], 0.5), inlay.Expert(third, small[1], -0.2)])
    assert len(fusion.voices) == 3
    z, a, b, c = (positioned(m, prompts) for m in (base, small[0], small[1], third))
    expected = (z + 0.5 * (a - b) - 0.2 * (c - b)).log_softmax(-1)
    real = prompts["attention_mask"].bool()
    assert torch.allclose(fusion.log_probs(**prompts)[real], expected[real], atol=1e-4)


# ---------------------------------------------------------------------- DExperts
def test_dexperts_filters_the_base_before_the_experts_speak():
    z = torch.tensor([[2.0, 1.0, 0.0, -1.0], [5.0, 0.0, 0.0, 0.0]])
    loud = torch.tensor([[0.0, 0.0, 0.0, 50.0]]).expand(2, -1)
    pair = Pair(loud, torch.zeros(2, 4))
    fused, w = inlay.DExperts(top_p=0.9).combine(z, [pair], [1.0])
    assert fused.exp()[:, 3].tolist() == [0.0, 0.0]  # p = .64 .24 .09 .03: the last is cut although an expert shouts
    assert (fused[0] > -torch.inf).tolist() == [True, True, True, False]
    assert (fused[1] > -torch.inf).tolist() == [True, False, False, False]
    assert w.tolist() == [[1.0, 1.0]]
    assert (inlay.DExperts(top_p=1.0, top_k=2).filtered(z)[0] > -torch.inf).tolist() == [True, True, False, False]
    everything = inlay.DExperts(top_p=1.0).combine(z, [pair], [0.5])[0]
    assert torch.equal(everything, inlay.ProxyTuning().combine(z, [pair], [0.5])[0])
    with pytest.raises(OptionError, match="top_p is a share"):
        inlay.DExperts(top_p=0.0)


def test_an_absent_expert_is_the_base(base, small, prompts):
    rule = inlay.DExperts()
    z, anti = positioned(base, prompts), positioned(small[0], prompts)
    expected = (rule.filtered(z) + 2.0 * (z - anti)).log_softmax(-1)
    real = prompts["attention_mask"].bool()
    found = inlay.fuse(base, inlay.Expert(None, small[0], 2.0), rule).log_probs(**prompts)
    assert torch.equal(found[real].isinf(), expected[real].isinf())
    assert torch.allclose(found[real].exp(), expected[real].exp(), atol=1e-5)


# ---------------------------------------------------------------------- dynamic fusion
def rows(*seeds: int) -> list[Tensor]:
    return [2 * torch.randn(5, 17, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]


def written_out(z: Tensor, pairs: list[Pair], w: Tensor) -> Tensor:
    """The objective of one row for weights (experts,), term by term."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)

    fused = z + sum(w_t * (q_t - q) for w_t, (q_t, q) in zip(w, pairs, strict=True))
    return sum(
        ((kl(fused, z) - kl(q_t, q)) ** 2 + (kl(z, fused) - kl(q, q_t)) ** 2 for q_t, q in pairs), z.new_zeros(())
    )


def test_dynamic_weight_is_the_minimum():
    z, q_t, q = rows(0, 1, 2)
    w = inlay.DynamicFusion().weights(z, [Pair(q_t, q)], [1.0])
    tried = torch.linspace(0, 2, 2001, dtype=torch.float64)
    for row in range(5):
        pair = [Pair(q_t[row], q[row])]
        values = torch.stack([written_out(z[row], pair, at[None]) for at in tried])
        assert float(written_out(z[row], pair, w[:, row])) <= float(values.min()) * (1 + 1e-4) + 1e-9
        assert abs(float(w[0, row] - tried[values.argmin()])) < 5e-3


def test_dynamic_weight_is_one_where_the_large_model_is_the_small_one():
    q_t, q = rows(1, 2)
    fused, w = inlay.DynamicFusion().combine(q, [Pair(q_t, q)], [1.0])
    assert torch.allclose(w, torch.ones_like(w), atol=2e-3)
    assert torch.allclose(fused, q_t.log_softmax(-1), atol=2e-2)


def test_dynamic_fusion_of_several():
    z, a, b, q = rows(0, 1, 3, 2)
    pairs = [Pair(a, q), Pair(b, q)]
    single = inlay.DynamicFusion().weights(z, pairs, [1.0, 1.0])
    assert (single.ne(0).sum(0) <= 1).all()
    together = inlay.DynamicFusion(together=True).weights(z, pairs, [1.0, 1.0])
    for row in range(5):
        own = [Pair(p.expert[row], p.anti[row]) for p in pairs]
        assert written_out(z[row], own, together[:, row]) <= written_out(z[row], own, single[:, row]) + 1e-9
        whole = Search(z, pairs, [1.0, 1.0], 2.0).objective(together[:, None])[0, row]
        assert torch.allclose(whole, written_out(z[row], own, together[:, row]))
    assert inlay.DynamicFusion().weights(z, pairs, [0.0, 1.0])[0].abs().max() == 0


def test_divergences_of_tokens_that_cannot_be():
    a, b = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.75, 0.0]]).log()
    there, back = divergences(a, b)
    assert torch.allclose(there, torch.tensor([0.5 * (torch.tensor(2.0).log() + torch.tensor(2 / 3).log())]))
    assert back.isfinite().all()


def test_dynamic_fusion_generates(base, small, prompts):
    fusion = inlay.fuse(base, inlay.Expert(*small), inlay.DynamicFusion())
    options = {"do_sample": False, "num_beams": 2, "max_new_tokens": 6}
    out = fusion.generate(**prompts, **options)
    assert torch.equal(out, base.generate(**prompts, **options, logits_processor=[fusion]))
    assert fusion.weights is not None
    assert ((fusion.weights >= 0) & (fusion.weights <= 2)).all()


# ---------------------------------------------------------------------- one model with an adapter on and off
def test_adapter_as_expert_is_two_models_in_one(base, small, prompts):
    model = decoder("gpt2", 16, 4)
    tuned = copy.deepcopy(model)
    for m in (model, tuned):
        adapter = inlay.adapt(m, LoRA(r=2), name="task")
        with torch.no_grad():
            for i, p in enumerate(adapter.parameters()):
                p.normal_(std=0.5, generator=torch.Generator().manual_seed(i))
    adapter.merge()
    plain = decoder("gpt2", 16, 4)
    two = inlay.fuse(base, inlay.Expert(tuned, plain))
    one = inlay.fuse(base, inlay.Expert(inlay.Acting(model, "task"), inlay.Acting(model)))
    for beams in (1, 3):
        options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 8}
        assert torch.equal(one.generate(**prompts, **options), two.generate(**prompts, **options))
    assert model.inlay.active == ["task"]
    with pytest.raises(inlay.core.errors.AdapterError, match="did you mean 'task'"):
        inlay.Acting(model, "tasks")


def test_the_base_itself_can_be_the_expert(prompts):
    """log P̃ ∝ z + 1·(z⁺ − z): the adapted base."""
    model = decoder()
    adapter = inlay.adapt(model, LoRA(r=2), name="task")
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.3)
    off, on = inlay.Acting(model), inlay.Acting(model, "task")
    options = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(inlay.fuse(off, inlay.Expert(on, off)).generate(**prompts, **options),
                       model.generate(**prompts, **options))  # fmt: skip
    turned = inlay.fuse(on, inlay.Expert(off, on)).generate(**prompts, **options)
    with inlay.disabled(model):
        assert torch.equal(turned, model.generate(**prompts, **options))


def test_an_expert_trained_in_between_is_heard_anew(base, small, prompts):
    fusion = inlay.fuse(base, inlay.Expert(*small))
    ids = prompts["input_ids"][:1]
    scores = base(ids).logits[:, -1]
    fusion(ids[:, :4], base(ids[:, :4]).logits[:, -1])
    before = fusion(ids, scores)
    fusion(ids[:, :4], base(ids[:, :4]).logits[:, -1])
    with torch.no_grad():
        small[0].lm_head.weight.mul_(1.5)
    after = fusion(ids, scores)
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(after, inlay.fuse(base, inlay.Expert(*small))(ids, scores), atol=1e-5)


def test_experts_speak_in_evaluation_mode(base, small, prompts):
    expected = inlay.fuse(base, inlay.Expert(*small)).log_probs(**prompts)
    small[0].train()  # GPT-2 has dropout of 0.1
    assert torch.equal(inlay.fuse(base, inlay.Expert(*small)).log_probs(**prompts), expected)
    assert small[0].training


# ---------------------------------------------------------------------- vocabularies and padding
def words(*tokens: str) -> SimpleNamespace:
    class Words(SimpleNamespace):
        def __len__(self) -> int:
            return len(tokens)

    return Words(get_vocab=lambda: {token: i for i, token in enumerate(tokens)})


def test_vocabularies_are_compared(base, small):
    with pytest.raises(FusionError, match="29 tokens and GPT2LMHeadModel among 19"):
        inlay.fuse(base, inlay.Expert(decoder("gpt2", 16, 1, 19), None))
    letters = [chr(97 + i) for i in range(19)]
    swapped = [letters[1], letters[0], *letters[2:]]
    with pytest.raises(FusionError, match="number 2 of 19 tokens differently \\('a' is 0 and 1"):
        inlay.fuse(base, inlay.Expert(*small, tokenizer=words(*swapped)), tokenizer=words(*letters))
    with pytest.raises(FusionError, match="at least one Expert"):
        inlay.fuse(base, [])
    with pytest.raises(FusionError, match="a model to follow"):
        inlay.Expert(None, None)
    with pytest.raises(FusionError, match="encoder-decoder"):
        inlay.fuse(base, inlay.Expert(transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=WORDS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))))  # fmt: skip


def test_other_widths_of_one_vocabulary(base, prompts):
    """Rows beyond the base's are not looked at; padding that the expert lacks is left as the base has it."""
    wide, letters = decoder("gpt2", 16, 1, 40), [chr(97 + i) for i in range(20)]
    found = inlay.fuse(base, inlay.Expert(wide)).log_probs(**prompts)
    expected = positioned(base, prompts) + positioned(wide, prompts)[..., :WORDS] - positioned(base, prompts)
    real = prompts["attention_mask"].bool()
    assert torch.allclose(found[real], expected.log_softmax(-1)[real], atol=1e-4)
    pair = decoder("gpt2", 16, 1, 20), decoder("gpt2", 16, 2, 20)
    expert = inlay.Expert(*pair, tokenizer=words(*letters))
    low = {"input_ids": prompts["input_ids"].clamp_max(19), "attention_mask": prompts["attention_mask"]}
    found = inlay.fuse(base, expert, tokenizer=words(*letters)).log_probs(**low)
    shift = nn.functional.pad(positioned(pair[0], low) - positioned(pair[1], low), (0, 9))
    assert torch.allclose(found[real], (positioned(base, low) + shift).log_softmax(-1)[real], atol=1e-4)


def test_padding_that_could_be_text_must_be_told(base, small, prompts):
    base.generation_config.pad_token_id = base.generation_config.eos_token_id = PAD
    fusion = inlay.fuse(base, inlay.Expert(*small))
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    with pytest.raises(FusionError, match="padding and the end of text alike"):
        base.generate(**prompts, **options, logits_processor=[fusion])
    told = base.generate(**prompts, **options, logits_processor=[fusion.processor(prompts["attention_mask"])])
    assert torch.equal(told, fusion.generate(**prompts, **options))
    with pytest.raises(FusionError, match="not that of these prompts"):
        base.generate(**prompts, **options, logits_processor=[fusion.processor(prompts["attention_mask"][:2])])
