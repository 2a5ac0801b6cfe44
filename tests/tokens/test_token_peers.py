"""The same virtual tokens in `peft`, by running it: logits and generation. (Its folders: tests/interop.)"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from token_models import GREEDY, classifier, close, decoder, generated, ids, padded, seq2seq
from torch import nn

import inlay
from inlay.methods import PrefixTuning, PromptTuning

P = 4
CASES = {
    "llama": (decoder, "CAUSAL_LM"),
    "gpt2": (decoder, "CAUSAL_LM"),
    "bert": (classifier, "SEQ_CLS"),
    "roberta": (classifier, "SEQ_CLS"),
    "t5": (seq2seq, "SEQ_2_SEQ_LM"),
    "bart": (seq2seq, "SEQ_2_SEQ_LM"),
}


def pair(name: str, method: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, theirs) with the same virtual tokens."""
    make, task = CASES[name]
    kind = peft.PromptTuningConfig if isinstance(method, PromptTuning) else peft.PrefixTuningConfig
    theirs = peft.get_peft_model(make(name), kind(task_type=task, num_virtual_tokens=P)).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    ours = make(name)
    built = inlay.adapt(ours, method, head=None).levels[0].method
    with torch.no_grad():
        weight.normal_(std=0.5)
        if isinstance(method, PromptTuning):
            built.P.copy_(weight[:P])
        else:
            L, heads, p, size = built.P_k.shape
            built.P_k.copy_(weight.view(p, L, 2, heads, size)[:, :, 0].permute(1, 2, 0, 3))
            built.P_v.copy_(weight.view(p, L, 2, heads, size)[:, :, 1].permute(1, 2, 0, 3))
    return ours, theirs


def batch_for(name: str) -> dict[str, Any]:
    batch = padded([ids(9), ids(5, seed=2)], "right")
    return batch | ({"decoder_input_ids": ids(2, 4)} if CASES[name][0] is seq2seq else {})


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", PromptTuning(tokens=P)),
        ("gpt2", PromptTuning(tokens=P)),
        ("bert", PromptTuning(tokens=P, keep=True)),
        ("roberta", PromptTuning(tokens=P, keep=True)),
        ("t5", PromptTuning(tokens=P)),
        ("bart", PromptTuning(tokens=P)),
        ("llama", PrefixTuning(tokens=P, shift=True)),
        ("gpt2", PrefixTuning(tokens=P, shift=True)),
        ("bert", PrefixTuning(tokens=P, shift=True)),
    ],
)
def test_the_same_logits(name: str, method: Any) -> None:
    ours, theirs = pair(name, method)
    batch = batch_for(name)
    logits, other = ours(**batch).logits, theirs(**copy.deepcopy(batch)).logits
    if CASES[name][1] == "CAUSAL_LM" and isinstance(method, PromptTuning):
        other = other[:, P:]  # it leaves the virtual tokens in
    close(logits, other)
    inlay.use(ours)
    assert not torch.allclose(ours(**batch).logits, logits, atol=1e-3)


@pytest.mark.parametrize("method", [PromptTuning(tokens=P), PrefixTuning(tokens=P, shift=True)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_the_same_text(name: str, method: Any) -> None:
    ours, theirs = pair(name, method)
    batch = {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    out = theirs.generate(**copy.deepcopy(batch), **GREEDY, output_logits=True, return_dict_in_generate=True)
    tokens, logits = generated(ours, batch)
    assert torch.equal(tokens, out.sequences)
    close(logits, torch.stack(out.logits, 1))
