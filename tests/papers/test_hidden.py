"""Reference values of methods on hidden states: parameter counts of the papers' tables, and pyreft's own outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import inlay
from inlay.methods import (
    AdaptFormer,
    Compacter,
    ConsReFT,
    DiReFT,
    Houlsby,
    LinAdapter,
    LLMParallel,
    LLMSeries,
    LobiReFT,
    LoReFT,
    NoReFT,
    ParallelAdapter,
    Pfeiffer,
)

# ------------------------------------------------------------------------------------------------ parameter counts
SIZES = {
    "bert-base": ("BertModel", {}),
    "roberta-base": ("RobertaModel", {"vocab_size": 50265, "max_position_embeddings": 514}),
    "roberta-large": ("RobertaModel", {"vocab_size": 50265, "max_position_embeddings": 514, "hidden_size": 1024,
                                       "num_hidden_layers": 24, "num_attention_heads": 16,
                                       "intermediate_size": 4096}),
    "gpt2-medium": ("GPT2LMHeadModel", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("GPT2LMHeadModel", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "llama-7b": ("LlamaForCausalLM", {}),
    "llama-13b": ("LlamaForCausalLM", {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
                                       "intermediate_size": 13824}),
    "bart-large": ("BartModel", {}),
    "vit-base": ("ViTModel", {}),
    "t5-base": ("T5Model", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
}  # fmt: skip
COUNTS = [
    # base, method, layers, adapter parameters
    ("roberta-base", Pfeiffer(r=16), None, 304_320),
    ("roberta-base", Pfeiffer(r=48), None, 894_528),
    ("roberta-base", Pfeiffer(r=48, drop=8), None, 298_176),  # the other reading of Adpt-D 0.3M
    ("roberta-large", Pfeiffer(r=16), None, 811_392),
    ("roberta-large", Pfeiffer(r=64), None, 3_171_840),
    ("roberta-large", Houlsby(r=8), None, 835_968),
    ("roberta-large", Houlsby(r=64), None, 6_343_680),
    ("bert-base", Houlsby(r=64), None, 2_379_264),
    ("bert-base", Pfeiffer(r=48), None, 894_528),
    ("gpt2-medium", LinAdapter(r=6), None, 368_784),
    ("gpt2-medium", LinAdapter(r=224), None, 11_089_152),
    ("gpt2-large", LinAdapter(r=8), None, 875_808),
    ("gpt2-large", LinAdapter(r=248), None, 23_002_848),
    ("bart-large", ParallelAdapter(r=512), None, 24 * 1_050_112),
    ("llama-7b", LoReFT(r=8), None, 2_097_408),
    ("llama-13b", LoReFT(r=8), None, 3_277_120),
    ("llama-7b", LoReFT(r=4, positions="f5+l5", tied=False), [3, 9, 18, 24], 4 * 2 * (2 * 4 * 4096 + 4)),
    ("llama-7b", DiReFT(r=8), None, 2_097_408),
    ("llama-7b", NoReFT(r=8), None, 2_097_408),
    ("llama-7b", ConsReFT(r=8), None, 32 * (8 * 4096 + 8)),
    ("llama-7b", LobiReFT(r=8), None, 32 * (8 * 4096 + 8)),
    ("llama-7b", LLMSeries(), None, 67_108_864),  # the 66M of LLM-Adapters' table, 0.99 % of the model with it
    ("llama-13b", LLMSeries(), None, 104_857_600),  # its 104M
    ("llama-7b", LLMParallel(), None, 32 * 2 * 256 * (4096 + 11008)),  # 3.54 % with it
    ("vit-base", AdaptFormer(r=64), None, 12 * (2 * 768 * 64 + 64 + 768)),
    ("vit-base", AdaptFormer(r=1), None, 12 * (2 * 768 + 1 + 768)),
    ("t5-base", Compacter(r=24), None, 48 * 2376 + 64),
    ("t5-base", Compacter(r=24).on("mlp.down"), None, 24 * 2376 + 64),  # Compacter++
]


def on_meta(name: str) -> nn.Module:
    import transformers

    kind, sizes = SIZES[name]
    cls = getattr(transformers, kind)
    with torch.device("meta"):
        return cls(cls.config_class(**sizes))


@pytest.mark.parametrize(("base", "method", "layers", "count"), COUNTS, ids=lambda v: str(v))
def test_adapter_parameters(base, method, layers, count):
    piece = inlay.adapt(on_meta(base), method, layers=layers)
    assert piece.adapter_parameters == count
    assert sum(level.method.count(level.site) for level in piece.levels) == count


# ------------------------------------------------------------------------------------------------ pyreft
@pytest.fixture(scope="module")
def reference():
    """(settings, tensors) that `pyreft_reference.py` got from pyreft."""
    with safe_open(Path(__file__).with_name("pyreft.safetensors"), framework="pt") as file:
        return json.loads(file.metadata()["about"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


PYREFT = {
    "loreft": (LoReFT(), {"A": "R", "W": "W", "b": "b"}), "direft": (DiReFT(), {"W2": "R", "W1": "W", "b": "b"}),
    "noreft": (NoReFT(), {"W2": "R", "W1": "W", "b": "b"}), "consreft": (ConsReFT(), {"A": "R", "b": "b"}),
    "lobireft": (LobiReFT(), {"A": "R", "b": "b"}),
    "rotated": (LoReFT(difference=False), {"A": "R", "W": "W", "b": "b"}),
}  # fmt: skip
"""Ours, and what theirs calls its tensors, the projection first."""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", PYREFT)
def test_pyreft_parity(reference, kind, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    about, found = reference
    model = LlamaForCausalLM(LlamaConfig(**about["base"])).eval()
    model.load_state_dict({k.removeprefix("base."): t for k, t in found.items() if k.startswith("base.")})
    method, names = PYREFT[kind]
    method = method.replace(r=about["rank"], positions=about["positions"], tied=tied)
    piece = inlay.adapt(model, method, layers=about["layers"])

    def theirs(i: int, name: str) -> torch.Tensor:
        """A tensor of our i-th site: theirs has the suffixes of all layers after the prefixes."""
        sets = [i] if tied else [i, i + len(about["layers"])]
        return torch.stack([found[f"{kind}.{tied}.{n}.{name}"] for n in sets])

    for i, level in enumerate(piece.levels):
        for ours, name in names.items():
            level.method.get_parameter(ours).data.copy_(theirs(i, name))
    ids, mask = found["ids"], found["mask"]
    logits = model(ids, mask).logits
    real = mask.bool()
    expected = found[f"{kind}.{tied}.logits"]
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)
    with inlay.disabled(model):
        assert (model(ids, mask).logits - expected)[real].abs().max() > 0.1  # the reference is not the base
    (logits.square() * mask[..., None]).sum().backward()
    for i, level in enumerate(piece.levels):
        for ours, name in list(names.items())[1:]:
            grad = level.method.get_parameter(ours).grad
            torch.testing.assert_close(grad, theirs(i, f"{name}.grad"), atol=1e-3, rtol=1e-4)
    tokens = model.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens, found[f"{kind}.{tied}.tokens"])
