"""Neutral names against the real module trees, and against what the models really compute."""

from __future__ import annotations

import contextlib
import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel

from inlay.core.anatomy import Anatomy, Part, anatomy

# ------------------------------------------------------------------------------------------------ tiny random models
TEXT = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36,
        "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}
BART = {"vocab_size": 50, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36, "max_position_embeddings": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_eos_token_id": 2}  # fmt: skip
VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36,
          "image_size": 16, "patch_size": 8}  # fmt: skip
CLIP = {"text_config": TEXT, "vision_config": {**VISION, "num_hidden_layers": 3}}
AUDIO = {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 36, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3),
         "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}  # fmt: skip
T5 = {"vocab_size": 50, "d_model": 24, "d_kv": 6, "d_ff": 36, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
      "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}  # fmt: skip
GPT2 = {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 36, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
DISTILBERT = {"vocab_size": 50, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 36, "max_position_embeddings": 32}
FALCON = {key: TEXT[key] for key in TEXT if key != "intermediate_size"}
NEW_FALCON = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
DECODER = {"is_decoder": True, "add_cross_attention": True}
MOE = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}

PLAIN = "attn attn.q attn.k attn.v attn.o norm1 mlp mlp.up mlp.down norm2"
CROSS = f"{PLAIN} cross cross.q cross.k cross.v cross.o cross_norm"
GATED = f"{PLAIN} mlp.gate"
EXPERTS = "attn attn.q attn.k attn.v attn.o norm1 mlp norm2 router mlp.experts.gate_up mlp.experts.down"
MIXER = "mixer mixer.in mixer.conv mixer.x mixer.dt mixer.out norm1"
BERT_EMBED = "embed embed.position embed.type embed.norm"
VIT = "patch embed embed.class norm"

# case: (model_type, configuration, names in block 0 by tower, names outside blocks)
CASES: dict[str, tuple[str, dict, dict[str, str], str]] = {
    "bert": ("bert", TEXT, {"": PLAIN}, f"{BERT_EMBED} pool"),
    "bert-decoder": ("bert", {**TEXT, **DECODER}, {"": CROSS}, f"{BERT_EMBED} pool"),
    "roberta": ("roberta", TEXT, {"": PLAIN}, f"{BERT_EMBED} pool"),
    "xlm-roberta": ("xlm-roberta", TEXT, {"": PLAIN}, f"{BERT_EMBED} pool"),
    "camembert": ("camembert", TEXT, {"": PLAIN}, f"{BERT_EMBED} pool"),
    "electra": ("electra", {**TEXT, "embedding_size": 20}, {"": PLAIN}, f"{BERT_EMBED} embed.widen"),
    "mpnet": ("mpnet", TEXT, {"": PLAIN}, "embed embed.position embed.norm embed.relative pool"),
    "deberta-v2": (
        "deberta-v2", {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                       "position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm",
                       "embedding_size": 20}, {"": PLAIN},
        "embed embed.norm embed.widen embed.relative embed.relative_norm"),
    "distilbert": ("distilbert", DISTILBERT, {"": PLAIN}, "embed embed.position embed.norm"),
    "gpt2": ("gpt2", GPT2, {"": PLAIN}, "embed embed.position norm"),
    "gpt2-cross": ("gpt2", {**GPT2, "add_cross_attention": True}, {"": CROSS}, "embed embed.position norm"),
    "llama": ("llama", GROUPED, {"": GATED}, "embed norm"),
    "smollm3": ("smollm3", GROUPED, {"": GATED}, "embed norm"),
    "qwen2": ("qwen2", GROUPED, {"": GATED}, "embed norm"),
    "qwen3": ("qwen3", WIDE, {"": f"{GATED} q_norm k_norm"}, "embed norm"),
    "mistral": ("mistral", WIDE, {"": GATED}, "embed norm"),
    "gemma": ("gemma", WIDE, {"": GATED}, "embed norm"),
    "gemma2": ("gemma2", WIDE, {"": f"{GATED} post_norm1 post_norm2"}, "embed norm"),
    "gemma3": ("gemma3_text", WIDE, {"": f"{GATED} q_norm k_norm post_norm1 post_norm2"}, "embed norm"),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4}, {"": EXPERTS}, "embed norm"),
    "qwen2_moe": (
        "qwen2_moe", {**GROUPED, **MOE},
        {"": f"{EXPERTS} mlp.shared.gate mlp.shared.up mlp.shared.down shared_router"}, "embed norm"),
    "qwen3_moe": ("qwen3_moe", {**WIDE, **MOE}, {"": f"{EXPERTS} q_norm k_norm"}, "embed norm"),
    "gpt_oss": ("gpt_oss", {**WIDE, "num_local_experts": 4}, {"": EXPERTS}, "embed norm"),
    "phi": ("phi", {**GROUPED, "hidden_size": 32}, {"": PLAIN.replace(" norm2", "")}, "embed norm"),
    "phi-qk-norm": (
        "phi", {**TEXT, "hidden_size": 32, "qk_layernorm": True}, {"": PLAIN.replace("norm2", "q_norm k_norm")},
        "embed norm"),
    "phi3": ("phi3", GROUPED, {"": GATED}, "embed norm"),
    "gpt_neox": ("gpt_neox", TEXT, {"": PLAIN}, "embed norm"),
    "falcon": ("falcon", FALCON, {"": PLAIN.replace(" norm2", "")}, "embed norm"),
    "falcon-40b": ("falcon", NEW_FALCON, {"": PLAIN}, "embed norm"),
    "falcon-rw": (
        "falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}, {"": PLAIN}, "embed norm"),
    "bloom": ("bloom", {"vocab_size": 50, "hidden_size": 24, "n_layer": 2, "n_head": 4}, {"": PLAIN},
              "embed embed.norm norm"),
    "opt": ("opt", {**FALCON, "ffn_dim": 36, "word_embed_proj_dim": 24}, {"": PLAIN}, "embed embed.position norm"),
    "mamba": ("mamba", {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4}, {"": MIXER},
              "embed norm"),
    "t5": ("t5", T5, {"encoder": PLAIN, "decoder": CROSS},
           "encoder.embed encoder.embed.relative encoder.norm decoder.embed decoder.embed.relative decoder.norm"),
    "mt5": ("mt5", {**T5, "feed_forward_proj": "gated-gelu"}, {"encoder": GATED, "decoder": f"{CROSS} mlp.gate"},
            "encoder.embed encoder.embed.relative encoder.norm decoder.embed decoder.embed.relative decoder.norm"),
    "bart": ("bart", BART, {"encoder": PLAIN, "decoder": CROSS},
             "encoder.embed encoder.embed.position encoder.embed.norm "
             "decoder.embed decoder.embed.position decoder.embed.norm"),
    "mbart": ("mbart", BART, {"encoder": PLAIN, "decoder": CROSS},
              "encoder.embed encoder.embed.position encoder.embed.norm encoder.norm "
              "decoder.embed decoder.embed.position decoder.embed.norm decoder.norm"),
    "marian": ("marian", BART, {"encoder": PLAIN, "decoder": CROSS},
               "encoder.embed encoder.embed.position decoder.embed decoder.embed.position"),
    "whisper": ("whisper", {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
                {"encoder": PLAIN, "decoder": CROSS},
                "encoder.stem.conv[0] encoder.stem.conv[1] encoder.embed.position encoder.norm "
                "decoder.embed decoder.embed.position decoder.norm"),
    "vit": ("vit", VISION, {"": PLAIN}, f"{VIT} pool"),
    "deit": ("deit", VISION, {"": PLAIN}, f"{VIT} pool"),
    "dinov2": ("dinov2", {**VISION, "mlp_ratio": 2}, {"": f"{PLAIN} scale1 scale2"}, VIT),
    "dinov2-swiglu": ("dinov2", {**VISION, "use_swiglu_ffn": True}, {"": f"{GATED} scale1 scale2"}, VIT),
    "dinov2-registers": ("dinov2_with_registers", VISION, {"": f"{PLAIN} scale1 scale2"}, VIT),
    "clip": ("clip", CLIP, {"text": PLAIN, "vision": PLAIN},
             "text.embed text.embed.position text.norm text.proj "
             "vision.patch vision.embed vision.embed.class vision.embed.position vision.embed.norm vision.norm "
             "vision.proj"),
    "siglip": ("siglip", CLIP, {"text": PLAIN, "vision": PLAIN},
               "text.embed text.embed.position text.norm text.pool vision.patch vision.embed vision.embed.position "
               "vision.norm vision.pool vision.pool.q vision.pool.k vision.pool.v vision.pool.o vision.pool.norm "
               "vision.pool.up vision.pool.down"),
    "wav2vec2": ("wav2vec2", AUDIO, {"": PLAIN},
                 "stem stem.conv[0] stem.conv[1] stem.norm[0] embed embed.norm embed.position norm"),
    "hubert": ("hubert", {**AUDIO, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}, {"": PLAIN},
               "stem stem.conv[0] stem.conv[1] stem.norm[0] stem.norm[1] embed embed.norm embed.position norm"),
    "resnet": ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]},
               {"": "conv[0] conv[1] conv[2] norm[0] norm[1] norm[2]"}, "stem stem.conv[0] stem.norm[0]"),
    "mobilenet_v2": (
        "mobilenet_v2", {"image_size": 32}, {"": "conv[0] conv[1] conv[2] norm[0] norm[1] norm[2]"},
        "stem stem.conv[0] stem.conv[1] stem.conv[2] stem.norm[0] stem.norm[1] stem.norm[2] neck neck.conv[0] "
        "neck.norm[0]"),
}  # fmt: skip
CASE = pytest.mark.parametrize("case", CASES)

# parts whose own forward is never called: the model reads their weight instead, so hooks on them would be dead
BYPASSED = {"mamba": {"mixer.conv", "mixer.dt"}, "siglip": {"pool.o"}, "deberta-v2": {"embed.relative"}}


@functools.cache
def build(case: str) -> nn.Module:
    kind, config, _, _ = CASES[case]
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **config)).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias") or "lambda" in name:
            nn.init.normal_(p, std=0.3)  # zero biases would hide mistakes
    return model


def inputs(case: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids, long = torch.randint(3, 50, (2, 5)), torch.randint(3, 50, (2, 7))
    kind = CASES[case][0]
    if kind in ("clip", "siglip"):
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    if kind in ("vit", "deit", "dinov2", "dinov2_with_registers"):
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    if kind in ("resnet", "mobilenet_v2"):
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    if kind in ("wav2vec2", "hubert"):
        return {"input_values": torch.randn(2, 400)}
    if kind == "whisper":
        return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids}
    if kind in ("t5", "mt5", "bart", "mbart", "marian"):
        return {"input_ids": long, "decoder_input_ids": ids}
    if case in ("bert-decoder", "gpt2-cross"):
        return {"input_ids": ids, "encoder_hidden_states": torch.randn(2, 7, 24)}
    return {"input_ids": ids}


def first_tensor(*values: object) -> Tensor | None:
    for value in values:
        items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else [value]
        found = [item for item in items if isinstance(item, Tensor)]
        if found:
            return found[0]
    return None


def run_watched(model: nn.Module, feed: dict[str, Tensor], paths: set[str]) -> tuple[dict, dict]:
    """First tensor in and out of every module of `paths` that is called."""
    seen_in: dict[str, Tensor | None] = {}
    seen_out: dict[str, Tensor | None] = {}
    with contextlib.ExitStack() as stack:
        for path in paths:

            def watch(module, args, kwargs, output, path=path):
                seen_in.setdefault(path, first_tensor(args, kwargs))  # DeBERTa projects positions in a second call
                seen_out.setdefault(path, first_tensor(output))

            handle = model.get_submodule(path).register_forward_hook(watch, with_kwargs=True)
            stack.callback(handle.remove)
        with torch.no_grad():
            model(**feed)
    return seen_in, seen_out


def places(part: Part) -> set[str]:
    return {part.path, part.entry or part.path}


def short(part: Part) -> str:
    """The name after tower and block."""
    return part.name.rpartition("].")[2] if part.depth is not None else part.name.rpartition("vision.")[2]


# ------------------------------------------------------------------------------------------------ names and places
@CASE
def test_expected_parts_and_no_others(case):
    kind, _, blocks, outside = CASES[case]
    model = build(case)
    found = anatomy(model)
    assert found.architecture == kind
    assert set(found.n_blocks) == set(blocks)
    for tower, expected in blocks.items():
        block = f"{tower}.block[0]" if tower else "block[0]"
        assert {n for n in found.parts if n.startswith(block)} == {block, *(f"{block}.{n}" for n in expected.split())}
        if kind not in ("resnet", "mobilenet_v2"):  # stages differ, blocks are alike
            last = block.replace("[0]", f"[{found.n_blocks[tower] - 1}]")
            assert {n for n in found.parts if n.startswith(last)} == {last, *(f"{last}.{n}" for n in expected.split())}
    assert {n for n, p in found.parts.items() if p.depth is None} == set(outside.split())


@CASE
def test_every_part_is_a_place_in_the_model(case):
    model = build(case)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, part in anatomy(model).parts.items():
        assert part.name == name
        assert part.path in modules
        assert part.entry is None or part.entry in modules
        if part.rows or part.param != "weight":
            assert isinstance(getattr(modules[part.path], part.param), nn.Parameter)


@CASE
def test_every_parameter_belongs_to_a_part(case):
    """Except tables that only tie others, free parameters of the model, and DeBERTa's projections of positions."""
    model = build(case)
    named = {part.path for part in anatomy(model).parts.values()}
    holders = {path for path, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    rest = {path for path in holders - named if "parametrizations" not in path}
    kind = CASES[case][0]
    free = {"": {"clip", "siglip", "wav2vec2", "hubert"}, "shared": {"t5", "mt5", "bart", "mbart", "marian"}}
    assert rest == {path for path, kinds in free.items() if kind in kinds}


@CASE
def test_block_counts_follow_the_configuration(case):
    model = build(case)
    expected = {
        "t5": {"encoder": 2, "decoder": 3}, "mt5": {"encoder": 2, "decoder": 3}, "bart": {"encoder": 2, "decoder": 3},
        "mbart": {"encoder": 2, "decoder": 3}, "marian": {"encoder": 2, "decoder": 3},
        "whisper": {"encoder": 2, "decoder": 3}, "clip": {"text": 2, "vision": 3}, "siglip": {"text": 2, "vision": 3},
        "mobilenet_v2": {"": 16},
    }.get(case, {"": 2})  # fmt: skip
    found = anatomy(model)
    assert found.n_blocks == expected
    for tower, n in expected.items():
        depths = [p.depth for p in found.match(f"{tower}.block" if tower else "block")]
        assert depths == list(range(n))


@CASE
def test_meta_models_give_the_same_anatomy(case):
    kind, config, _, _ = CASES[case]
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind, **config))
    assert anatomy(model) == anatomy(build(case))


# ------------------------------------------------------------------------------------------------ what really runs
@CASE
def test_parts_run_and_belong_together(case):
    """Every part is called, except the known bypasses, and a part's input is its projections' input."""
    model = build(case)
    found = anatomy(model)
    paths = set().union(*map(places, found.parts.values()))
    seen_in, seen_out = run_watched(model, inputs(case), paths)
    dead = {short(part) for part in found.parts.values() if part.path not in seen_out}
    assert dead == BYPASSED.get(case, set())
    for part in found.parts.values():
        for whole, inner in (("attn", "attn.q"), ("cross", "cross.q"), ("mlp", "mlp.up"), ("mixer", "mixer.in")):
            if short(part) == whole and f"{part.name[: -len(whole)]}{inner}" in found.parts:
                entering = found.parts[f"{part.name[: -len(whole)]}{inner}"]
                assert torch.equal(seen_in[part.entry or part.path], seen_in[entering.path]), part.name


@CASE
def test_sublayers_end_before_the_residual(case):
    """With their last projection zero, `attn`, `cross`, `mlp` and `mixer` output zero."""
    model = copy.deepcopy(build(case))
    found = anatomy(model)
    for pattern in ("attn.o", "cross.o", "mlp.down", "mlp.experts.down", "mlp.shared.down", "mixer.out"):
        for part in found.match(pattern):
            module = model.get_submodule(part.path)
            for name in {part.param, "bias", f"{part.param}_bias"} & set(dict(module.named_parameters(recurse=False))):
                nn.init.zeros_(getattr(module, name))
    spans = [p for word in ("attn", "cross", "mlp", "mixer") for p in found.match(word)]
    _, seen_out = run_watched(model, inputs(case), {part.path for part in spans})
    for part in spans:
        assert not seen_out[part.path].any(), part.name


@CASE
def test_token_sequence_enters_at_embed_and_leaves_at_trim(case):
    model = build(case)
    found = anatomy(model)
    if CASES[case][0] in ("resnet", "mobilenet_v2"):
        assert (found.embed, found.trim) == (None, None)
        return
    _, seen_out = run_watched(model, inputs(case), {found.embed, *found.trims.values()})
    entering, leaving = seen_out[found.embed], seen_out[found.trim]
    assert entering.dim() == leaving.dim() == 3
    assert entering.shape[:2] == leaving.shape[:2]
    assert set(found.trims) == set(found.n_blocks)
    assert all(seen_out[path].dim() == 3 for path in found.trims.values())


CALLS: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []


def probe(module, query, key, value, attention_mask, **options):
    """Plain attention that keeps what it was given."""
    CALLS.append((module, query, key, value))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def probed(model: nn.Module, feed: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """(path of the attention module, query, key, value) of every call of the attention interface."""
    AttentionInterface.register("inlay_probe", probe)
    model.set_attn_implementation("inlay_probe")
    CALLS.clear()
    with torch.no_grad():
        model(**feed)
    paths = {module: path for path, module in model.named_modules()}
    return [(paths[module], q, k, v) for module, q, k, v in CALLS]


@CASE
def test_attention_sites_are_the_callers_of_the_interface(case):
    model = copy.deepcopy(build(case))
    found = anatomy(model)
    if CASES[case][0] in ("falcon", "bloom", "mpnet", "deberta-v2", "mamba", "resnet", "mobilenet_v2"):
        assert found.attention == []  # these compute attention themselves, or have none
        return
    calls = probed(model, inputs(case))
    assert {path: (k.shape[1], k.shape[-1]) for path, _, k, _ in calls} == {
        site.path: (site.n_kv_heads, site.head_dim) for site in found.attention
    }
    crossing = {path for path, q, k, _ in calls if q.shape[2] != k.shape[2]}
    assert crossing == {site.path for site in found.attention if site.is_cross}
    for site in found.attention:
        word = "cross" if site.is_cross else "attn"
        part = found.parts[".".join(filter(None, (site.tower, f"block[{site.depth}]", word)))]
        assert site.path in places(part)


# ------------------------------------------------------------------------------------------------ packed matrices
def outputs_of(part: Part, size: int) -> list[int]:
    """The output features that a part claims, from the definition of `rows`."""
    if part.rows is None:
        return list(range(size))
    kind, *numbers = part.rows
    if kind == "slice":
        return list(range(*numbers))
    groups, group, offset, length = numbers
    assert groups * group == size
    return [g * group + offset + i for g in range(groups) for i in range(length)]


def silence(model: nn.Module, part: Part) -> None:
    """Zero the rows (and biases) that a part claims, so that its outputs are zero."""
    module = model.get_submodule(part.path)
    weight = getattr(module, part.param)
    transposed = type(module).__name__ == "Conv1D"
    index = outputs_of(part, weight.shape[1 if transposed else 0])
    bias = getattr(module, "in_proj_bias" if part.param == "in_proj_weight" else "bias", None)
    with torch.no_grad():
        (weight.T if transposed else weight)[index] = 0
        if bias is not None:
            bias[index] = 0


def check_letters(make, record, where: str) -> None:
    """Silencing each of q, k, v must zero exactly that tensor in `record(model)` and leave the other two alone."""
    before = record(make())
    for i, letter in enumerate("qkv"):
        model = make()
        parts = anatomy(model).match(f"block[0].{where}.{letter}")
        assert len(parts) == 1
        silence(model, parts[0])
        for j, (old, new) in enumerate(zip(before, record(model), strict=True)):
            assert old.ne(0).all()
            assert (not new.any()) if i == j else torch.equal(old, new), f"{where}.{letter} -> {'qkv'[j]}"


@pytest.mark.parametrize(
    ("case", "where"),
    [("gpt2", "attn"), ("gpt2-cross", "attn"), ("gpt2-cross", "cross"), ("gpt_neox", "attn"), ("phi3", "attn"),
     ("llama", "attn"), ("bert", "attn"), ("bert-decoder", "cross"), ("vit", "attn")],
)  # fmt: skip
def test_query_key_value_rows(case, where):
    found = anatomy(build(case))
    path = next(s.path for s in found.attention if s.depth == 0 and s.is_cross == (where == "cross"))

    def record(model):
        return next(tensors for p, *tensors in probed(model, inputs(case)) if p == path)

    check_letters(lambda: copy.deepcopy(build(case)), record, where)


@pytest.mark.parametrize(
    ("case", "splitter"),
    [("falcon", "_split_heads"), ("falcon-40b", "_split_heads"), ("falcon-rw", "_split_heads"), ("bloom", "_reshape")],
)
def test_query_key_value_rows_where_attention_splits_itself(case, splitter, monkeypatch):
    model = build(case)
    attention = model.h[0].self_attention
    original = getattr(type(attention), splitter)
    split: list[tuple] = []

    def recording(self, fused):
        split.append(original(self, fused))
        return split[-1]

    monkeypatch.setattr(type(attention), splitter, recording)

    def record(model):
        split.clear()
        with torch.no_grad():
            model(**inputs(case))
        return split[0]

    check_letters(lambda: copy.deepcopy(model), record, "attn")


def test_gate_and_up_rows():
    """Phi-3 packs both: silencing the gate zeroes what the activation sees, silencing up zeroes the product."""
    act, down = "layers.0.mlp.activation_fn", "layers.0.mlp.down_proj"
    before, product = run_watched(build("phi3"), inputs("phi3"), {act, down})[0].values()
    assert before.ne(0).all()
    assert product.ne(0).all()
    for name in ("gate", "up"):
        model = copy.deepcopy(build("phi3"))
        silence(model, anatomy(model).parts[f"block[0].mlp.{name}"])
        seen, _ = run_watched(model, inputs("phi3"), {act, down})
        assert not seen[down].any()
        assert (not seen[act].any()) if name == "gate" else torch.equal(seen[act], before)


# ------------------------------------------------------------------------------------------------ known by structure
class TimmAttention(nn.Module):
    """As timm's `Attention`: one packed projection, thirds."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.q_norm, self.proj = nn.Linear(dim, 3 * dim), nn.Identity(), nn.Linear(dim, dim)
        self.split: tuple = ()

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        self.split = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(*self.split)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class TimmBlock(nn.Module):
    def __init__(self, dim: int, gated: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim), TimmAttention(dim, 4), nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        names = ("w12", "w3") if gated else ("fc1", "fc2")
        self.mlp = nn.ModuleDict({names[0]: nn.Linear(dim, 2 * dim), names[1]: nn.Linear(dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x))


class TimmViT(nn.Module):
    def __init__(self, depth: int = 3, gated: bool = False, head: bool = True) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 24, 8, 8)})
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.Sequential(*(TimmBlock(24, gated) for _ in range(depth)))
        self.norm, self.fc_norm = nn.LayerNorm(24), nn.Identity()
        self.head = nn.Linear(24, 10) if head else nn.Identity()


def in_block(found: Anatomy, i: int) -> set[str]:
    """Names within block i of a lone tower."""
    return {n.removeprefix(f"block[{i}].") for n, part in found.parts.items() if part.depth == i} - {f"block[{i}]"}


def test_timm_vit():
    found = anatomy(TimmViT())
    assert found.architecture == "timm-vit"
    assert found.n_blocks == {"": 3}
    assert (found.backbone, found.embed, found.trim) == ("", "pos_drop", "norm")
    assert in_block(found, 1) == set(PLAIN.split())  # nn.Identity is no part
    assert {n for n, p in found.parts.items() if p.depth is None} == {"patch", "embed", "norm", "head"}
    assert len(found.match("vision.attn.v")) == 3
    assert "head" not in anatomy(TimmViT(head=False)).parts


def test_timm_rows():
    torch.manual_seed(0)
    model, x = TimmViT(), torch.randn(2, 5, 24)

    def record(model):
        model.blocks(x)
        return model.blocks[0].attn.split

    check_letters(lambda: copy.deepcopy(model), record, "attn")
    gated = anatomy(TimmViT(gated=True)).parts
    assert (gated["block[0].mlp.gate"].rows, gated["block[0].mlp.up"].rows) == (("slice", 0, 24), ("slice", 24, 48))


def test_timm_names_with_other_row_order_are_not_taken_for_thirds():
    model = TimmViT()
    for block in model.blocks:
        block.attn.attention_biases = nn.Parameter(torch.zeros(4, 4))  # LeViT and TinyViT interleave heads
    assert anatomy(model).architecture is None


def test_timm_towers_and_stages():
    model = nn.ModuleDict({"student": TimmViT(2), "teacher": TimmViT(3)})
    assert anatomy(model).n_blocks == {"student": 2, "teacher": 3}
    stages = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"blocks": TimmViT(2).blocks}) for _ in range(2))})
    found = anatomy(stages)
    assert found.n_blocks == {"": 4}
    assert found.parts["block[3].attn.o"].path == "layers.1.blocks.1.attn.proj"
    assert anatomy(nn.ModuleDict({"trunk": TimmViT()})).backbone == "trunk"


def test_torch_encoder():
    model = nn.ModuleDict({"body": nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 36, batch_first=True), 2)})
    found = anatomy(model)
    assert found.architecture == "torch-transformer"
    assert found.trim == found.backbone == "body"
    assert in_block(found, 1) == set(PLAIN.split())
    v = found.parts["block[1].attn.v"]
    assert (v.path, v.param, v.rows) == ("body.layers.1.self_attn", "in_proj_weight", ("slice", 48, 72))
    assert (found.parts["block[1].mlp"].entry, found.parts["block[1].mlp"].path) == (
        "body.layers.1.linear1",
        "body.layers.1.linear2",
    )
    lone = anatomy(nn.TransformerEncoderLayer(24, 4))
    assert lone.parts["block[0]"].path == ""
    assert lone.parts["block[0].attn.o"].path == "self_attn.out_proj"


def test_torch_encoder_decoder():
    found = anatomy(nn.Transformer(24, 4, 2, 3, 36, batch_first=True))
    assert found.n_blocks == {"encoder": 2, "decoder": 3}
    names = {n.removeprefix("decoder.block[0].") for n in found.parts if n.startswith("decoder.block[0].")}
    assert names == set(CROSS.split())
    assert found.parts["decoder.block[0].cross.q"].path == "decoder.layers.0.multihead_attn"
    assert found.parts["decoder.block[0].norm2"].path == "decoder.layers.0.norm3"


def test_multihead_attention_rows():
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.MultiheadAttention(24, 4), "two": nn.MultiheadAttention(24, 4, kdim=8, vdim=8)})
    found = anatomy(model)
    assert found.architecture == "torch-attention"
    assert in_block(found, 0) == {"attn", "attn.q", "attn.k", "attn.v", "attn.o"}
    assert "block[0]" not in found.parts
    assert [found.parts[f"block[1].attn.{x}"].param for x in "qkv"] == [f"{x}_proj_weight" for x in "qkv"]
    x = torch.randn(5, 2, 24)
    bias = nn.init.normal_(model["one"].in_proj_bias)
    for letter in "qkv":
        attention = copy.deepcopy(model["one"])
        silence(nn.ModuleDict({"one": attention}), found.parts[f"block[0].attn.{letter}"])
        y, weights = attention(x, x, x)
        if letter == "v":
            assert torch.allclose(y, attention.out_proj.bias.expand_as(y))
            assert not torch.allclose(weights, torch.full_like(weights, 0.2))
        else:  # no query or no key: uniform attention over values that are unchanged
            values = x @ model["one"].in_proj_weight[48:].T + bias[48:]
            uniform = attention.out_proj(values.mean(0, keepdim=True)).expand_as(y)
            assert torch.allclose(y, uniform, atol=1e-6)


# ------------------------------------------------------------------------------------------------ task models
BERT_LM = {"head": "cls", "head.hidden": "cls.predictions.transform.dense", "head.out": "cls.predictions.decoder",
           "head.norm": "cls.predictions.transform.LayerNorm"}  # fmt: skip
TASKS = [  # class, case whose configuration it takes, backbone, paths of the head's parts
    ("BertForSequenceClassification", "bert", "bert", {"head": "classifier"}),
    ("BertForQuestionAnswering", "bert", "bert", {"head": "qa_outputs"}),
    ("BertForMaskedLM", "bert", "bert", BERT_LM),
    ("RobertaForSequenceClassification", "roberta", "roberta",
     {"head": "classifier", "head.hidden": "classifier.dense", "head.out": "classifier.out_proj"}),
    ("RobertaForMaskedLM", "roberta", "roberta",
     {"head": "lm_head", "head.hidden": "lm_head.dense", "head.norm": "lm_head.layer_norm",
      "head.out": "lm_head.decoder"}),
    ("DistilBertForSequenceClassification", "distilbert", "distilbert",
     {"head": "classifier", "head.hidden": "pre_classifier"}),
    ("GPT2LMHeadModel", "gpt2", "transformer", {"head": "lm_head"}),
    ("GPT2ForSequenceClassification", "gpt2", "transformer", {"head": "score"}),
    ("LlamaForCausalLM", "llama", "model", {"head": "lm_head"}),
    ("LlamaForSequenceClassification", "llama", "model", {"head": "score"}),
    ("Qwen2MoeForCausalLM", "qwen2_moe", "model", {"head": "lm_head"}),
    ("Gemma3ForCausalLM", "gemma3", "model", {"head": "lm_head"}),
    ("Phi3ForCausalLM", "phi3", "model", {"head": "lm_head"}),
    ("FalconForCausalLM", "falcon-40b", "transformer", {"head": "lm_head"}),
    ("GPTNeoXForCausalLM", "gpt_neox", "gpt_neox", {"head": "lm_head"}),
    ("OPTForCausalLM", "opt", "model", {"head": "lm_head"}),
    ("MambaForCausalLM", "mamba", "backbone", {"head": "lm_head"}),
    ("T5ForConditionalGeneration", "t5", "", {"head": "lm_head"}),
    ("T5ForSequenceClassification", "t5", "transformer",
     {"head": "classification_head", "head.hidden": "classification_head.dense",
      "head.out": "classification_head.out_proj"}),
    ("BartForConditionalGeneration", "bart", "model", {"head": "lm_head"}),
    ("MarianMTModel", "marian", "model", {"head": "lm_head"}),
    ("WhisperForConditionalGeneration", "whisper", "model", {"head": "proj_out"}),
    ("ViTForImageClassification", "vit", "vit", {"head": "classifier"}),
    ("Dinov2WithRegistersForImageClassification", "dinov2-registers", "dinov2_with_registers", {"head": "classifier"}),
    ("Wav2Vec2ForCTC", "wav2vec2", "wav2vec2", {"head": "lm_head"}),
    ("Wav2Vec2ForSequenceClassification", "wav2vec2", "wav2vec2",
     {"head": "classifier", "head.hidden": "projector"}),
    ("ResNetForImageClassification", "resnet", "resnet", {"head": "classifier", "head.out": "classifier.1"}),
    ("MobileNetV2ForImageClassification", "mobilenet_v2", "mobilenet_v2", {"head": "classifier"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "case", "backbone", "head"), TASKS, ids=[t[0] for t in TASKS])
def test_task_models_hold_the_backbone_and_a_head(name, case, backbone, head):
    kind, config, _, _ = CASES[case]
    with torch.device("meta"):
        model = getattr(transformers, name)(AutoConfig.for_model(kind, **config))
    bare, found = anatomy(build(case)), anatomy(model)
    assert found.backbone == backbone
    assert {n: p.path for n, p in found.parts.items() if n.startswith("head")} == head
    prefix = f"{backbone}." if backbone else ""
    for part in found.parts.values():
        if not part.name.startswith("head"):
            assert part.path.startswith(prefix)
            plain = bare.parts[part.name]
            assert (part.path.removeprefix(prefix), part.rows, part.depth) == (plain.path, plain.rows, plain.depth)
    missing = {n for n in bare.parts if n not in found.parts}
    assert missing <= {"pool"}  # task models may be built without the pooler
    assert found.embed == (bare.embed and prefix + bare.embed)
    assert found.trim == (bare.trim and prefix + bare.trim)
    assert [prefix + s.path for s in bare.attention] == [s.path for s in found.attention]


HALVES = [  # one tower of a model that usually has two: class, case, backbone, prefix of its paths, aliases
    ("T5EncoderModel", "t5", "", "encoder.", {"encoder", "text"}),
    ("T5ForTokenClassification", "t5", "transformer", "transformer.encoder.", {"encoder", "text"}),
    ("BartForCausalLM", "bart", "model", "model.decoder.", {"decoder", "text"}),
    ("WhisperForAudioClassification", "whisper", "encoder", "encoder.", {"encoder", "audio"}),
    ("CLIPForImageClassification", "clip", "vision_model", "vision_model.", {"vision"}),
    ("CLIPVisionModelWithProjection", "clip", "vision_model", "vision_model.", {"vision"}),
    ("CLIPTextModelWithProjection", "clip", "text_model", "text_model.", {"text"}),
    ("CLIPVisionModel", "clip", "", "", {"vision"}),
    ("SiglipVisionModel", "siglip", "", "", {"vision"}),
    ("SiglipForImageClassification", "siglip", "vision_model", "vision_model.", {"vision"}),
    ("SiglipTextModel", "siglip", "", "", {"text"}),
]


@pytest.mark.parametrize(("name", "case", "backbone", "prefix", "aliases"), HALVES, ids=[h[0] for h in HALVES])
def test_a_tower_by_itself_needs_no_prefix(name, case, backbone, prefix, aliases):
    cls = getattr(transformers, name)
    config = AutoConfig.for_model(CASES[case][0], **CASES[case][1])
    sub = {"CLIPVision": "vision_config", "CLIPText": "text_config", "SiglipVision": "vision_config",
           "SiglipText": "text_config"}  # fmt: skip
    attribute = next((value for key, value in sub.items() if name.startswith(key)), None)
    with torch.device("meta"):
        model = cls(getattr(config, attribute) if attribute else config)
    found = anatomy(model)
    assert found.backbone == backbone
    assert set(found.n_blocks) == {""}
    assert found.aliases == aliases
    assert found.parts["block[1].attn.v"].path.startswith(prefix)
    for alias in aliases:
        assert found.match(f"{alias}.attn.v") == found.match("attn.v") != []
    if "Projection" in name:
        assert found.parts["proj"].path in ("visual_projection", "text_projection")


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("case", ["t5", "bart", "whisper"])
def test_stacks_taken_out_of_their_model(case, side):
    found = anatomy(build(case).get_submodule(side))
    inside = anatomy(build(case))
    mine = {n.removeprefix(f"{side}."): p.path for n, p in inside.parts.items() if n.startswith(side)}
    assert {n: f"{side}.{p.path}" for n, p in found.parts.items()} == mine


def test_inside_any_module():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = build("bert")
            self.classifier = nn.Linear(24, 3)

    found = anatomy(Net())
    assert (found.architecture, found.backbone, found.parts["head"].path) == ("bert", "body", "classifier")
    assert found.parts["block[1].mlp"].entry == "body.encoder.layer.1.intermediate.dense"


def test_inside_wrappers():
    class Passing(nn.Module):
        """As compiled and PEFT models: the configuration shows, the model is further in."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.base, self.config = model, model.config

    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(AutoConfig.for_model("bert", **TEXT))
    for wrapper, prefix in ((Passing(model), "base"), (nn.Sequential(model), "0")):
        found = anatomy(wrapper)
        assert (found.backbone, found.parts["head"].path) == (f"{prefix}.bert", f"{prefix}.classifier")


def test_several_known_models_in_one():
    vision, text = AutoConfig.for_model("clip_vision_model", **VISION), AutoConfig.for_model("llama", **GROUPED)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    found = anatomy(model)
    assert found.architecture == "llava"
    assert found.n_blocks == {"vision": 2, "text": 2}
    assert found.parts["vision.block[1].attn.v"].path == "model.vision_tower.encoder.layers.1.self_attn.v_proj"
    assert found.parts["text.block[1].mlp.gate"].path == "model.language_model.layers.1.mlp.gate_proj"
    assert found.embed == "model.language_model.embed_tokens"
    assert found.trim == "model.language_model.norm"
    assert found.parts["head"].path == "lm_head"
    pair = anatomy(nn.ModuleDict({"query": build("bert"), "document": build("roberta")}))
    assert set(pair.n_blocks) == {"query", "document"}


def test_older_vit_tree():
    """Older transformers spelled ViT's projections as BERT's."""

    def tree(paths: str) -> nn.Module:
        root = nn.Module()
        for path in paths.split():
            node = root
            for name in path.split("."):
                if name not in dict(node.named_children()):
                    node.add_module(name, nn.Module())
                node = node.get_submodule(name)
        return root

    block = "attention.attention.query attention.attention.key attention.attention.value attention.output.dense \
        intermediate.dense output.dense layernorm_before layernorm_after"
    model = tree(" ".join(f"vit.encoder.layer.{i}.{p}" for i in range(2) for p in block.split()) + " vit.layernorm")
    model.config = SimpleNamespace(model_type="vit", num_attention_heads=4, hidden_size=24)
    found = anatomy(model)
    assert found.backbone == "vit"
    assert in_block(found, 0) == set(PLAIN.split())
    assert [site.path for site in found.attention] == [f"vit.encoder.layer.{i}.attention.attention" for i in range(2)]


def test_unknown_architecture():
    for model in (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(2, 2), build("bert").pooler):
        found = anatomy(model)
        assert found == Anatomy()
        assert found.architecture is None
        assert found.match("attn.q") == []
        assert found.match("norm") == []
        assert found.near("attn.q") == []
        assert found.name_of("0") is None


# ------------------------------------------------------------------------------------------------ patterns
def names(model: str | Anatomy, pattern: str) -> list[str]:
    found = anatomy(build(model)) if isinstance(model, str) else model
    return [part.name for part in found.match(pattern)]


@pytest.mark.parametrize(
    ("case", "pattern", "expected"),
    [
        ("bert", "attn.q", "block[0].attn.q block[1].attn.q"),
        ("bert", "q", "block[0].attn.q block[1].attn.q"),
        ("bert", "block[1]", "block[1]"),
        ("bert", "block", "block[0] block[1]"),
        ("bert", "block[*]", "block[0] block[1]"),
        ("bert", "block[1].attn.q", "block[1].attn.q"),
        ("bert", "block[-1].mlp.up", "block[1].mlp.up"),
        ("bert", "block[1:]", "block[1]"),
        ("bert", "block[-2:].attn", "block[0].attn block[1].attn"),
        ("bert", "block[::-1].attn", "block[0].attn block[1].attn"),
        ("bert", "block[0, -1].attn.o", "block[0].attn.o block[1].attn.o"),
        ("bert", "block[2]", ""),
        ("bert", "block[-3]", ""),
        ("bert", "block[5:]", ""),
        ("bert", "attn", "block[0].attn block[1].attn"),
        ("bert", "mlp.*", "block[0].mlp.up block[0].mlp.down block[1].mlp.up block[1].mlp.down"),
        ("bert", "block[0].mlp.*", "block[0].mlp.up block[0].mlp.down"),
        ("bert", "mlp.d*", "block[0].mlp.down block[1].mlp.down"),
        ("bert", "norm", "embed.norm block[0].norm1 block[0].norm2 block[1].norm1 block[1].norm2"),
        ("bert", "norm2", "block[0].norm2 block[1].norm2"),
        ("bert", "block[0].norm", "block[0].norm1 block[0].norm2"),
        ("bert", "embed", "embed"),
        ("bert", "embed.*", "embed.position embed.type embed.norm"),
        ("bert", "text.embed", "embed"),
        ("bert", "vision.attn.q", ""),
        ("qwen3", "block[0].norm", "block[0].q_norm block[0].k_norm block[0].norm1 block[0].norm2"),
        ("qwen3", "block[0].attn.*", "block[0].attn.q block[0].attn.k block[0].attn.v block[0].attn.o"),
        ("mixtral", "block[0].mlp.*", "block[0].mlp.experts.gate_up block[0].mlp.experts.down"),
        ("mixtral", "experts.down", "block[0].mlp.experts.down block[1].mlp.experts.down"),
        ("gpt2", "block[0].attn.qkv", "block[0].attn.qkv"),
        ("gpt2", "block[0].attn.*", "block[0].attn.q block[0].attn.k block[0].attn.v block[0].attn.o"),
        ("phi3", "block[1].mlp.gate_up", "block[1].mlp.gate_up"),
        ("vit", "vision.block[1].attn.v", "block[1].attn.v"),
        ("dinov2", "vision.attn.v", "block[0].attn.v block[1].attn.v"),
        ("clip", "vision.block[2].attn.v", "vision.block[2].attn.v"),
        ("clip", "block[2].attn.v", "vision.block[2].attn.v"),
        ("clip", "block[-1].attn.v", "text.block[1].attn.v vision.block[2].attn.v"),
        ("clip", "text.attn.q", "text.block[0].attn.q text.block[1].attn.q"),
        ("clip", "vision", ""),
        ("bart", "cross.k", "decoder.block[0].cross.k decoder.block[1].cross.k decoder.block[2].cross.k"),
        ("bart", "decoder.block[0].cross.q", "decoder.block[0].cross.q"),
        ("bart", "encoder.cross.k", ""),
        ("t5", "norm", None),
        ("resnet", "stem.conv", "stem.conv[0]"),
        ("resnet", "block[0].conv[-1]", "block[0].conv[2]"),
        ("resnet", "block[0].conv[1:]", "block[0].conv[1] block[0].conv[2]"),
        ("bert", "encoder.layer.0.attention.self.query", ""),
        ("bert", "query", ""),
        ("bert", "dense", ""),
        ("bert", "*", ""),
        ("bert", "all-linear", ""),
        ("bert", r".*attn\.q", ""),
        ("bert", "", ""),
        ("bert", "block[x].attn", ""),
        ("bert", "block[::0]", ""),
        ("bert", "block[]", ""),
        ("bert", "block[0", ""),
    ],
)
def test_match(case, pattern, expected):
    found = names(case, pattern)
    if expected is None:  # every normalisation of the model, and nothing else
        model = build(case)
        norms = {path for path, module in model.named_modules() if "LayerNorm" in type(module).__name__}
        assert {anatomy(model).parts[n].path for n in found} == norms
    else:
        assert found == expected.split()


def test_packed_whole_is_the_packed_module():
    (part,) = anatomy(build("gpt2")).match("block[0].attn.qkv")
    assert (part.path, part.rows, part.depth) == ("h.0.attn.c_attn", None, 0)
    (cross,) = anatomy(build("gpt2-cross")).match("block[1].cross.kv")
    assert cross.path == "h.1.crossattention.c_attn"


@pytest.mark.parametrize(
    ("case", "wrong", "right"),
    [("bert", "attn.query", "attn.q"), ("bert", "mlp.upp", "mlp.up"), ("bert", "emb", "embed"),
     ("bert", "block[99].attn.q", "block[1].attn.q"), ("bert", "blok", "block[0]"), ("llama", "mlp.gat", "mlp.gate"),
     ("bart", "decoder.cros.k", "decoder.cross.k"), ("clip", "vison.attn.v", "vision.attn.v"),
     ("vit", "vision.atn.v", "vision.attn.v")],
)  # fmt: skip
def test_near_names_match(case, wrong, right):
    found = anatomy(build(case))
    assert found.match(wrong) == []
    near = found.near(wrong)
    assert right in near
    assert len(near) <= 5
    assert all(found.match(name) for name in near)
    assert found.near("zzzzzzzz") == []


@CASE
def test_names_lead_back(case):
    """Path and rows give the name again, and every name is matched by itself."""
    found = anatomy(build(case))
    for name, part in found.parts.items():
        if part.entry is None and part.param == "weight":
            assert found.name_of(part.path, part.rows) == name
        assert part in found.match(name)


def test_names_of_packed_and_shared_modules():
    bert, gpt2 = anatomy(build("bert")), anatomy(build("gpt2"))
    assert bert.name_of("encoder.layer.0.output.dense") == "block[0].mlp.down"  # also the end of the span `mlp`
    assert bert.name_of("encoder.layer.0.output.dropout") is None
    assert gpt2.name_of("h.1.attn.c_attn") == "block[1].attn.qkv"
    assert gpt2.name_of("h.1.attn.c_attn", ("slice", 48, 72)) == "block[1].attn.v"
    assert gpt2.name_of("h.1.attn.c_attn", ("slice", 0, 1)) is None
