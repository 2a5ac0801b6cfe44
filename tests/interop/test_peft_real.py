"""A real pretrained encoder: LoRA and VeRA trained a little by PEFT, DoRA by inlay, each read by the other."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft_bases import Base
from peft_checks import both_ways, from_inlay, quiet
from torch import nn

import inlay
import inlay.models
from inlay.methods import DoRA, LoRA

SENTENCES = ["the film is a quiet triumph", "an hour too long , and it shows", "who wrote this ?"]


@pytest.fixture(scope="module")
def minilm() -> Base:
    opened = inlay.models.open("minilm", "text-classification", num_labels=2)
    call = dict(opened.processor(SENTENCES, return_tensors="pt", padding=True))

    class Same(Base):
        def __call__(self) -> nn.Module:  # the pretrained weights as they are
            return inlay.models.open("minilm", "text-classification", num_labels=2).model.eval()

    return Same(lambda: nn.Identity(), call)


TARGETS = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
CONFIGS: dict[str, tuple[type[peft.PeftConfig], dict]] = {
    "lora": (peft.LoraConfig, {"r": 8, "lora_alpha": 16, **TARGETS}),
    "dora": (peft.LoraConfig, {"r": 4, "target_modules": "all-linear", "use_dora": True, "bias": "all"}),
    "lokr": (peft.LoKrConfig, {"r": 4, "target_modules": "all-linear"}),
    "oft": (peft.OFTConfig, {"oft_block_size": 32, **TARGETS}),
    "adalora": (peft.AdaLoraConfig, {"init_r": 6, "total_step": 10, **TARGETS}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_peft_on_minilm(minilm: Base, case: str, tmp_path: Path) -> None:
    config, options = CONFIGS[case]
    with quiet():
        adapter = both_ways(minilm, config(**options), tmp_path)
    assert len([level for level in adapter.levels if "layer.5" in level.site.path]) > 0


def test_dora_of_minilm_in_peft(minilm: Base, tmp_path: Path) -> None:
    model = minilm()
    adapter = inlay.adapt(model, DoRA(of=LoRA(r=4)), ["attn.q", "attn.v"])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(2):
        loss = model(**minilm.call, labels=torch.tensor([1, 0, 1])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    from_inlay(minilm, adapter, tmp_path)
