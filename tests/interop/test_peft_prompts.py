"""Folders of PEFT with virtual tokens of every kind, read and written, with PEFT as the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from peft_bases import BASES
from peft_checks import both_ways, close, peft_folder, peft_output, perturb
from safetensors.torch import load_file

import inlay
from inlay.core.errors import CheckpointError
from inlay.interop.peft import write
from inlay.methods import DePT, LLaMAAdapter, PrefixTuning, PromptTuning, PTuning, PTuningV2

CASES = {
    "prompt": ("llama", peft.PromptTuningConfig, {"task_type": "CAUSAL_LM"}),
    "prompt-gpt2": ("gpt2", peft.PromptTuningConfig, {"task_type": "CAUSAL_LM"}),
    "prompt-classifier": ("bert", peft.PromptTuningConfig, {"task_type": "SEQ_CLS"}),
    "prompt-roberta": ("roberta", peft.PromptTuningConfig, {"task_type": "SEQ_CLS"}),
    "prompt-last": ("llama-classifier", peft.PromptTuningConfig, {"task_type": "SEQ_CLS"}),
    "encoded-mlp": ("llama", peft.PromptEncoderConfig, {"task_type": "CAUSAL_LM", "encoder_hidden_size": 6}),
    "encoded-lstm": (
        "gpt2",
        peft.PromptEncoderConfig,
        {"task_type": "CAUSAL_LM", "encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"},
    ),
    "encoded-classifier": ("bert", peft.PromptEncoderConfig, {"task_type": "SEQ_CLS", "encoder_hidden_size": 6}),
    "prefix": ("llama", peft.PrefixTuningConfig, {"task_type": "CAUSAL_LM"}),
    "prefix-gpt2": ("gpt2", peft.PrefixTuningConfig, {"task_type": "CAUSAL_LM"}),
    "prefix-mlp": ("llama", peft.PrefixTuningConfig, {"task_type": "CAUSAL_LM", "prefix_projection": True}),
    "prefix-last": ("llama-classifier", peft.PrefixTuningConfig, {"task_type": "SEQ_CLS"}),
    "prefix-classifier": ("bert", peft.PrefixTuningConfig, {"task_type": "SEQ_CLS"}),
}


@pytest.mark.parametrize("case", CASES)
def test_theirs_and_back(case: str, tmp_path: Path) -> None:
    name, kind, options = CASES[case]
    base = BASES[name]
    options = {"num_virtual_tokens": 4, **options}
    expected, count = peft_folder(base, kind(**options), tmp_path / "theirs")
    model = base()
    untouched = base.output(model)
    adapter = inlay.load(model, tmp_path / "theirs")
    mine = base.output(model)
    close(mine, expected[:, -mine.shape[1] :])
    assert not torch.allclose(mine, untouched, atol=1e-3)
    if "mlp" not in case and "encoded" not in case:  # what PEFT folds away when it saves
        assert adapter.adapter_parameters + adapter.head_parameters == count
    write(adapter, tmp_path / "ours")
    again = peft_output(base, tmp_path / "ours")
    close(again, expected)
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)


OURS = {
    "prompt": ("llama", PromptTuning(tokens=3)),
    "prompt-classifier": ("bert", PromptTuning(tokens=3, keep=True)),
    "prompt-no-head": ("roberta", PromptTuning(tokens=3, keep=True)),
    "encoded": ("llama", PTuning(tokens=3, hidden=4)),
    "encoded-classifier": ("bert", PTuning(tokens=3, encoder="mlp", keep=True)),
    "deep": ("bert", PTuningV2(tokens=3, shift=True)),
    "deep-mlp": ("gpt2", PTuningV2(tokens=3, shift=True, reparameterize=True, hidden=8)),
    "adaption": ("llama", LLaMAAdapter(tokens=3, gate="plain")),
    "adaption-top": ("llama", LLaMAAdapter(tokens=3, layers=1, gate="plain")),
    "prefix": ("gpt2", PrefixTuning(tokens=3, shift=True)),
    "prefix-mlp": ("llama", PrefixTuning(tokens=3, shift=True, reparameterize=True, hidden=8)),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_in_peft(case: str, tmp_path: Path) -> None:
    name, method = OURS[case]
    base = BASES[name]
    adapter = inlay.adapt(base(), method, head=None if "no-head" in case else "auto")
    perturb(adapter.model)
    expected = base.output(adapter.model)
    write(adapter, tmp_path)
    theirs = peft_output(base, tmp_path)
    close(theirs[:, -expected.shape[1] :], expected)


def test_padding_on_the_right_agrees(tmp_path: Path) -> None:
    base = BASES["llama"]
    peft_folder(base, peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), tmp_path)
    call = {k: v.clone() for k, v in base.call.items()}
    call["attention_mask"][1, 5:] = 0
    padded = type(base)(base.make, call)
    model = padded()
    inlay.load(model, tmp_path)
    real = call["attention_mask"].bool()
    close(padded.output(model)[real], peft_output(padded, tmp_path)[:, 4:][real])


@pytest.mark.parametrize(
    ("name", "method", "where", "reason"),
    [
        ("llama", PrefixTuning(tokens=2), None, "shift=True"),
        ("llama", PrefixTuning(tokens=2, shift=True), ["block[0].attn"], "leaves some out"),
        ("llama", PTuningV2(tokens=2), None, "PTuningV2\\(shift=True\\)"),
        ("bert", PromptTuning(tokens=2), None, "keep=True"),
        ("bert", PTuning(tokens=2), None, "PTuning\\(keep=True\\)"),
        ("llama", DePT(tokens=2), None, "no counterpart of DePT"),
        ("llama", LLaMAAdapter(), None, "gate='plain'"),
        ("llama", LLaMAAdapter(gate="plain"), ["block[0].attn"], "leaves some of them out"),
        ("llama-classifier", LLaMAAdapter(gate="plain"), None, "saves no trained modules"),
        ("llama-biased", LLaMAAdapter(gate="plain"), None, "adds its bias twice"),
        ("gpt2", LLaMAAdapter(gate="plain"), None, "without that projection"),
        ("gemma", LLaMAAdapter(gate="plain"), None, "for llama and mistral"),
    ],
)
def test_what_peft_cannot_express(
    name: str, method: object, where: list[str] | None, reason: str, tmp_path: Path
) -> None:
    adapter = inlay.adapt(BASES[name](), method, where)
    with pytest.raises(CheckpointError, match=reason):
        write(adapter, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_prefix_of_another_base(tmp_path: Path) -> None:
    peft_folder(BASES["llama"], peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), tmp_path)
    with pytest.raises(CheckpointError, match="wrong base"):
        inlay.load(BASES["gpt2"](), tmp_path)


@pytest.mark.parametrize("layers", [1, 2])
def test_adaption_prompts(layers: int, tmp_path: Path) -> None:
    both_ways(
        BASES["llama"], peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=layers, task_type="CAUSAL_LM"), tmp_path
    )


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt2", {}, "without that projection"),
        ("llama-biased", {}, "are not attentions that adaption prompts can be read for"),
        ("llama", {"adapter_layers": 3}, "it has 2"),
        ("llama", {"target_modules": "attention"}, "are not attentions that"),
    ],
)
def test_adaption_prompts_that_mean_something_else_here(
    name: str, changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    peft_folder(
        BASES[name], peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"), tmp_path
    )
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    model = BASES[name]()
    with pytest.raises(CheckpointError, match=reason):
        inlay.load(model, tmp_path)
    assert "inlay" not in model._modules
