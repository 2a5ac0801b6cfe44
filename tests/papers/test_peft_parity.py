"""PEFT 0.21.2 as the yardstick of what is trained: the same settings give the same counts and the same tensors."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import inlay
from inlay.methods import (
    IA3,
    OFT,
    AdaLoRA,
    BitFit,
    DoRA,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    NormTuning,
    PrefixTuning,
    PromptTuning,
    RoAd,
    VeRA,
)

Placed = tuple[str, object, list[str] | None, peft.PeftConfig]


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=60, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=60,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return transformers.ResNetForImageClassification(config)


MODELS = {"bert": bert, "llama": llama, "gpt2": gpt2, "resnet": resnet}
CLASSIFIER = {"task_type": "SEQ_CLS"}
LANGUAGE = {"task_type": "CAUSAL_LM"}
CASES: dict[str, Placed] = {
    "lora": (
        "bert", LoRA(r=4), ["attn.q", "attn.v"],
        peft.LoraConfig(r=4, target_modules=["query", "value"], **CLASSIFIER),
    ),
    "lora-all-linear": ("llama", LoRA(r=2), ["all-linear"], peft.LoraConfig(r=2, target_modules="all-linear")),
    "lora-bias": (
        "bert", LoRA(r=2, bias=True), ["attn.q", "mlp.up"],
        peft.LoraConfig(r=2, target_modules=["query", "intermediate.dense"], lora_bias=True, **CLASSIFIER),
    ),
    "lora-conv": (
        "resnet", LoRA(r=3), ["convolution"],
        peft.LoraConfig(r=3, target_modules=["convolution"], modules_to_save=["classifier"]),
    ),
    "lora-embedding": (
        "llama", LoRA(r=3), ["embed", "attn.q"], peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"]),
    ),
    "lora-conv1d": ("gpt2", LoRA(r=3), ["mlp.up"], peft.LoraConfig(r=3, target_modules=["c_fc"])),
    "dora": ("llama", DoRA(of=LoRA(r=4)), ["attn.q", "attn.v"], peft.LoraConfig(r=4, use_dora=True)),
    "lora-bitfit": (
        "bert", [LoRA(r=2).on("attn.q"), BitFit()], None,
        peft.LoraConfig(r=2, target_modules=["query"], bias="all", **CLASSIFIER),
    ),
    "vera": ("bert", VeRA(r=7), ["attn.q", "attn.v"], peft.VeraConfig(r=7, target_modules=["query", "value"])),
    "loha": ("bert", LoHa(r=3), ["attn.q", "attn.v"], peft.LoHaConfig(r=3, target_modules=["query", "value"])),
    "loha-conv": (
        "resnet", LoHa(r=2, tucker=True), ["convolution"],
        peft.LoHaConfig(r=2, use_effective_conv2d=True, target_modules=["convolution"]),
    ),
    "lokr": ("llama", LoKr(r=1), ["all-linear"], peft.LoKrConfig(r=1, target_modules="all-linear")),
    "lokr-conv": ("resnet", LoKr(r=1), ["convolution"], peft.LoKrConfig(r=1, target_modules=["convolution"])),
    "oft": ("bert", OFT(block_size=8), ["attn.q"], peft.OFTConfig(oft_block_size=8, target_modules=["query"])),
    "oft-shared": (
        "llama", OFT(block_size=8, shared=True), ["embed", "mlp.down"],
        peft.OFTConfig(oft_block_size=8, block_share=True, target_modules=["embed_tokens", "down_proj"]),
    ),
    "road": (
        "llama", RoAd(variant=2), ["all-linear"],
        peft.RoadConfig(variant="road_2", group_size=4, target_modules="all-linear"),
    ),
    "adalora": (
        "bert", AdaLoRA(r=4, target=2), ["attn.q"],
        peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["query"]),
    ),
    "glora": (
        "bert", GLoRA(r=3, D="constant", E="constant"), ["attn.q"], peft.GloraConfig(r=3, target_modules=["query"]),
    ),
    "ia3": (
        "llama", IA3(), None,
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "norms": ("llama", NormTuning(), None, peft.LNTuningConfig(**LANGUAGE)),
    "prompt": ("llama", PromptTuning(tokens=5), None, peft.PromptTuningConfig(num_virtual_tokens=5, **LANGUAGE)),
    "prefix": ("llama", PrefixTuning(tokens=5), None, peft.PrefixTuningConfig(num_virtual_tokens=5, **LANGUAGE)),
    "prefix-mlp": (
        "gpt2", PrefixTuning(tokens=5, reparameterize=True, hidden=16), None,
        peft.PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16, **LANGUAGE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_trained_numbers(case: str) -> None:
    name, method, where, config = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, _ = peft.get_peft_model(MODELS[name](), config).get_nb_trainable_parameters()
    head = None if config.task_type is None and not config.modules_to_save else "auto"
    ours = inlay.adapt(MODELS[name](), method, where, head=head)
    assert ours.adapter_parameters + ours.head_parameters == theirs
    assert sum(level.method.count(level.site) for level in ours.levels) == theirs


STEPS: dict[str, tuple[str, peft.PeftConfig]] = {
    "lora": ("bert", peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "dense"], **CLASSIFIER)),
    "lora-bias": ("bert", peft.LoraConfig(r=3, target_modules=["query"], lora_bias=True, bias="all", **CLASSIFIER)),
    "lora-embedding": ("llama", peft.LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"])),
    "lora-conv": ("resnet", peft.LoraConfig(r=3, target_modules=["convolution"], modules_to_save=["classifier"])),
    "dora": ("llama", peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"])),
    "dora-conv": ("resnet", peft.LoraConfig(r=3, use_dora=True, target_modules=["convolution"])),
    "vera": ("bert", peft.VeraConfig(r=7, target_modules=["query", "value"], **CLASSIFIER)),
    "loha": ("llama", peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"])),
    # not in its Tucker form, whose hand-written gradient of hada_w1_a and hada_w2_a is none in PEFT 0.21.2
    "loha-conv": ("resnet", peft.LoHaConfig(r=2, target_modules=["convolution"])),
    "lokr": ("llama", peft.LoKrConfig(r=1, alpha=2, decompose_both=True, target_modules="all-linear")),
    "lokr-conv": ("resnet", peft.LoKrConfig(r=1, target_modules=["convolution"])),
    "oft": ("bert", peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=["query"])),
    "oft-neumann": ("llama", peft.OFTConfig(oft_block_size=8, target_modules=["embed_tokens", "down_proj"])),
    "road": ("llama", peft.RoadConfig(group_size=8, target_modules="all-linear")),
    "road-4": ("bert", peft.RoadConfig(variant="road_4", group_size=4, target_modules=["query", "dense"])),
    "vblora": ("bert", peft.VBLoRAConfig(num_vectors=7, vector_length=8, target_modules=["query", "dense"])),
    "adalora": ("bert", peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=9, target_modules=["query", "dense"])),
    "adalora-conv": ("resnet", peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["convolution"])),
    "glora": ("bert", peft.GloraConfig(r=2, config_D_E="vector", target_modules=["query", "dense"])),
    "ia3": ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "norms": ("bert", peft.LNTuningConfig(target_modules=["LayerNorm"], **CLASSIFIER)),
}


@pytest.mark.parametrize("case", STEPS)
def test_two_training_steps(case: str, tmp_path: Path) -> None:
    """From the same tensors, two steps of SGD leave both with the same tensors."""
    name, config = STEPS[case]

    def base() -> nn.Module:
        torch.manual_seed(1)
        return MODELS[name]().eval()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base(), config)
        for p in theirs.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn_like(p)
        theirs.eval().save_pretrained(str(tmp_path / "start"))
        model = base()
        ours = inlay.load(model, tmp_path / "start")
        for trained in (theirs, model):
            train(trained, name)
        theirs.save_pretrained(str(tmp_path / "theirs"))
    inlay.export_peft(ours, tmp_path / "ours")
    start, a, b = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("start", "theirs", "ours"))
    moved = [k for k in a if k in b and not torch.equal(a[k], start[k])]
    assert len(moved) >= len(a) // 2
    for key in moved:
        torch.testing.assert_close(b[key], a[key], atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def train(model: nn.Module, name: str) -> None:
    """Two steps on a fixed batch, without dropout."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        if name == "resnet":
            logits = model(pixel_values=torch.randn(2, 3, 16, 16, generator=generator)).logits
        else:
            logits = model(input_ids=torch.randint(3, 60, (2, 6), generator=generator)).logits
        target = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
