"""LoRA and DoRA folders of PEFT, read and written, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from peft_bases import BASES
from peft_checks import adapted_here, both_ways

from inlay.methods import NOLA, BitFit, DoRA, Full, LoRA, LoRAFA, LoRAXS, PiSSA, VBLoRA

LORA = {
    "bert": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "roberta-rs": ("roberta", {"target_modules": ["key"], "task_type": "SEQ_CLS", "use_rslora": True}),
    "dropout": ("bert", {"target_modules": ["query"], "lora_dropout": 0.3}),
    "llama-all": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "regex": ("llama", {"target_modules": r".*\.1\.(self_attn|mlp)\.(q|k|down)_proj"}),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "layers-pattern": (
        "bert", {"target_modules": ["query"], "layers_to_transform": 0, "layers_pattern": "layer"},
    ),
    "exclude": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 6,
            "rank_pattern": {"v_proj": 2, r"layers\.0\.self_attn\.q_proj": 3}, "alpha_pattern": {"down_proj": 5},
        },
    ),
    "patterns-rs": (
        "llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "use_rslora": True},
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "resnet": ("resnet", {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}),
    "conv": ("conv", {"target_modules": ["one", "two", "point", "three", "out"], "r": 2}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "lora_dropout": 0.1}),
    "embedding-tied": ("llama-tied", {"target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"}),
    "embedding-scaled": ("gemma", {"target_modules": ["embed_tokens"]}),
    "embedding-positions": ("bert", {"target_modules": ["word_embeddings", "position_embeddings", "query"]}),
    "output": ("llama-tied", {"target_modules": ["lm_head"]}),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 2},
    ),
    "experts-alone": (
        "mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "use_rslora": True},
    ),
    "experts-transposed": (
        "gpt-oss",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 2},
    ),
    "experts-patterns": (
        "mixtral",
        {
            "target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.gate_up_proj": 3}, "alpha_pattern": {"experts.down_proj": 5},
        },
    ),
    "parameter": ("llama", {"target_modules": [], "target_parameters": ["0.self_attn.q_proj.weight"]}),
    "in-proj": ("attention", {"target_modules": [], "target_parameters": ["attn.in_proj_weight"]}),
    "gaussian": ("bert", {"target_modules": ["query"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("bert", {"target_modules": ["query"], "init_lora_weights": "orthogonal"}),
    "mica-like": ("bert", {"target_modules": ["query"], "init_lora_weights": False}),
    "dora": ("bert", {"target_modules": ["query", "dense"], "use_dora": True}),
    "dora-gpt2": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "dora-conv": ("conv", {"target_modules": ["one", "two", "point", "three"], "use_dora": True}),
    "dora-embedding": ("llama", {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True}),
    "dora-patterns": (
        "llama", {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "rank_pattern": {"v_proj": 1}},
    ),
    "bias-only": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "bias-all": ("bert", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "bias-all-bare": ("roberta", {"target_modules": ["query"], "bias": "all"}),
    "bias-gpt2": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "bias-dora": ("bert", {"target_modules": ["query"], "bias": "lora_only", "use_dora": True}),
    "lora-bias": ("bert", {"target_modules": ["query", "intermediate.dense"], "lora_bias": True, "r": 3}),
    "lora-bias-conv": ("conv", {"target_modules": ["one", "point"], "lora_bias": True}),
    "head-deep": ("roberta", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "head-two": ("distilbert", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "modules-embedding": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "modules-norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", LORA)
def test_theirs_and_back(case: str, tmp_path: Path) -> None:
    name, options = LORA[case]
    both_ways(BASES[name], peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options}), tmp_path)


OURS = {
    "bert": ("bert", LoRA(r=3, alpha=5), ["attn.q", "attn.v"], {}),
    "no-head": ("bert", LoRA(r=3), ["attn.q"], {"head": None}),
    "overrides": (
        "llama", LoRA(r=4, alpha=6), ["attn.q", "mlp.up"],
        {"overrides": {"block[0]": {"r": 2}, "block[1].mlp.up": {"alpha": 3.0}}},
    ),
    "packed-q-v": ("gpt2", LoRA(r=2, alpha=3), ["attn.q", "attn.v"], {}),
    "packed-rs": ("gpt2", LoRA(r=2, alpha=3, rank_stabilized=True), ["attn.q", "attn.v"], {}),
    "packed-ranks": ("gpt2", LoRA(r=2, alpha=3), ["attn.q", "attn.v"], {"overrides": {"attn.v": {"r": 3}}}),
    "packed-bias": ("gpt2", LoRA(r=2, alpha=3, bias=True), ["attn.k", "mlp.up"], {}),
    "packed-dora": ("gpt2", DoRA(of=LoRA(r=2)), ["attn.q", "attn.v"], {}),
    "stacked": ("llama", [LoRA(r=2).on("attn.q"), LoRA(r=3, alpha=2).on("attn.q")], None, {}),
    "conv": ("conv", LoRA(r=2), ["one", "three"], {}),
    "experts": ("mixtral", LoRA(r=2), ["experts.gate_up_proj", "q_proj"], {}),
    "attention": ("attention", LoRA(r=2), ["attn.in_proj_weight"], {}),
    "dora": ("resnet", DoRA(of=LoRA(r=2)), ["convolution"], {}),
    "pissa": ("bert", PiSSA(r=3, alpha=5), ["attn.q", "attn.v"], {}),
    "pissa-conv": ("conv", PiSSA(r=2), ["one", "three"], {}),
    "pissa-dora": ("bert", DoRA(of=PiSSA(r=2)), ["attn.q"], {}),
    "lora-fa": ("llama", LoRAFA(r=3, alpha=5), ["embed", "attn.q"], {}),
    "lora-xs": ("gpt2", LoRAXS(r=3, alpha=5), ["attn.q", "attn.v"], {}),
    "nola": ("llama", NOLA(r=2, bases=5), ["attn.q", "mlp.down"], {}),
    "vb-lora": ("bert", VBLoRA(r=2, vectors=9), ["attn.q", "mlp.up"], {}),
    "norms-whole": ("bert", [LoRA(r=2).on("query"), Full().on("LayerNorm")], None, {"head": None}),
    "biases": ("bert", [LoRA(r=2).on("query"), BitFit()], None, {}),
    "biases-here": ("bert", [LoRA(r=2).on("query"), BitFit().on("query")], None, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_ours_in_peft(case: str, tmp_path: Path) -> None:
    adapted_here(*OURS[case], tmp_path)
