"""Methods on tokens, keys and values: counts of the papers, and PEFT 0.21.2 trained beside them from equal tensors."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import inlay
from inlay.core.method import Method
from inlay.methods import DePT, LLaMAAdapter, PrefixTuning, PromptTuning, PTuning, PTuningV2
from inlay.optim import optimizer
from inlay.plan import plan

COUNTS: list[tuple[str, Method, int]] = [
    ("gpt2-medium", PrefixTuning(tokens=10), 491_520),
    ("roberta-large", PTuningV2(tokens=128), 6_291_456),
    ("gpt2-medium", PrefixTuning(tokens=10, reparameterize=True), 10 * 1024 + 1025 * 512 + 513 * 2 * 24 * 1024),
    ("roberta-large", PTuningV2(reparameterize=True), 20 * 1024 + 1025 * 512 + 513 * 2 * 24 * 1024),
    ("bert-base", PTuning(tokens=20), 20 * 768 + 7_090_176 + 1_181_184),
    ("bert-base", PTuning(tokens=20, encoder="mlp"), 20 * 768 + 3 * 769 * 768),
    ("bert-base", PromptTuning(tokens=100), 76_800),
    ("bert-base", DePT(), 76_800),  # m=40, r=45, S=256: the numbers of 100 vanilla tokens
    ("bert-base", DePT(tokens=60, r=30), 76_800),
    ("llama-7b", LLaMAAdapter(), 30 * 10 * 4096 + 30 * 32),  # 1.2M
    ("llama-7b", LLaMAAdapter(gate="plain", layers=40), 32 * 10 * 4096 + 32),
]


@pytest.mark.parametrize(("arch", "method", "count"), [pytest.param(*c, id=f"{c[0]}-{c[1].label()}") for c in COUNTS])
def test_counts(arch: str, method: Method, count: int) -> None:
    assert plan(arch, method, memory=False).adapter_parameters == count


def test_what_is_kept_of_the_encoders() -> None:
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=2, vocab_size=50))
    for method, kept in ((PTuning(), 20 * 768), (PTuningV2(reparameterize=True), 2 * 2 * 768 * 20)):
        (level,) = inlay.adapt(model, method).levels
        assert sum(t.numel() for t in level.method.stored().values()) == level.method.kept(level.site) == kept
        inlay.detach(model)


def test_the_two_rates_of_dept() -> None:
    """A prompt's rate of 0.3 and 5e-3 for A and B, as the official runs have them: one is 60 times the other."""
    adapter = inlay.adapt(llama(), DePT(tokens=2, r=3, length=9))
    found = {len(group["params"]): group["lr"] * group["scale"] for group in optimizer(adapter, 0.3).param_groups}
    assert found == pytest.approx({1: 0.3, 2: 5e-3})


# ---------------------------------------------------------------------- PEFT
def llama(shared: bool = True) -> nn.Module:
    """With two query heads to a key-value head, or without."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2 if shared else 4,
        intermediate_size=48, vocab_size=60,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


TASK: Any = {"task_type": "CAUSAL_LM"}
VIRTUAL = {"num_virtual_tokens": 5, **TASK}
PAIRS: dict[str, tuple[Method, peft.PeftConfig]] = {
    "ptuning-mlp": (
        PTuning(tokens=5, encoder="mlp", hidden=12), peft.PromptEncoderConfig(encoder_hidden_size=12, **VIRTUAL),
    ),
    "ptuning-lstm": (
        PTuning(tokens=5, hidden=16),  # the paper's d/2
        peft.PromptEncoderConfig(encoder_reparameterization_type="LSTM", encoder_hidden_size=16, **VIRTUAL),
    ),
    "ptuningv2": (PTuningV2(tokens=5, shift=True, dropout=0.0), peft.PrefixTuningConfig(**VIRTUAL)),
    "ptuningv2-mlp": (
        PTuningV2(tokens=5, shift=True, dropout=0.0, reparameterize=True, hidden=12),
        peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=12, **VIRTUAL),
    ),
    "llamaadapter": (
        LLaMAAdapter(tokens=5, layers=2, gate="plain"),
        peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=2, **TASK),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_trained_beside_peft(case: str) -> None:
    """The same tensors, the same loss, and after three steps of SGD the same tensors again."""
    method, config = PAIRS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared = case != "ptuningv2-mlp"  # where heads are shared, PEFT's E is as narrow as the keys
        theirs = peft.get_peft_model(llama(shared), config).eval()
    model = llama(shared)
    adapter = inlay.adapt(model, method)
    torch.manual_seed(2)
    pairs = same_tensors(adapter.levels[0].method, theirs)
    for ours, other in pairs:
        other.copy_(0.5 * torch.randn_like(other))
        ours.copy_(other)
    for _ in range(3):
        losses = [step(either) for either in (model, theirs)]
        torch.testing.assert_close(*losses)
    for ours, other in pairs:
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-5)


def same_tensors(method: Method, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Views of ours and of PEFT's that hold the same numbers."""
    ours, others = [p.data for p in method.parameters()], [p.data for p in trained(theirs)]
    if isinstance(method, LLaMAAdapter):  # PEFT has a prompt and a gate per layer
        return list(zip([part for i in range(2) for part in (ours[0][i : i + 1], ours[1][i])], others, strict=True))
    if len(others) == 1:  # of keys and values PEFT has one table
        others = list(others[0].view(5, 3, 2, 2, 8).permute(2, 1, 3, 0, 4).unbind())
    return list(zip(ours, others, strict=True))


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module) -> Tensor:
    ids = torch.arange(16).reshape(2, 8) * 7 % 57 + 3
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -8:]  # PEFT's have virtual tokens
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    with torch.no_grad():
        for p in trained(model):
            p -= 0.1 * p.grad
            p.grad = None
    return loss.detach()
