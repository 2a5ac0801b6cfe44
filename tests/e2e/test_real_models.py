"""Real pretrained models on real data, from a recipe to an adapter that loads anywhere."""

import json
import subprocess
import sys

import pytest
import torch

import inlay
import inlay.data
import inlay.models
from inlay.evaluate import evaluate
from inlay.methods import LoRA
from inlay.recipe import Recipe
from inlay.train import train


def trained(tmp_path, **fields):
    return train(Recipe(output=str(tmp_path / "run"), evaluate_every=10_000, checkpoint_every=None, **fields))


def fell(curve, by: float) -> bool:
    """Whether the mean loss of the last quarter is below `by` times that of the first."""
    losses = [point["loss"] for point in curve]
    quarter = max(1, len(losses) // 4)
    return sum(losses[-quarter:]) < by * sum(losses[:quarter])


def test_minilm_classifies_questions_and_the_folder_is_enough_to_evaluate(tmp_path):
    run = trained(tmp_path, model="minilm", data="trec", method="lora", steps=60, limit={"validation": 50, "test": 200})
    assert run.metrics["accuracy"] > 0.6  # the commonest class is 0.23
    again = evaluate(run.folder, limit=200)
    assert again["accuracy"] == pytest.approx(run.metrics["accuracy"])


def test_minilm_scores_sentence_similarity(tmp_path):
    run = trained(
        tmp_path, model="minilm", data="stsb", method="lora", steps=120, max_length=48,
        limit={"validation": 50, "test": 300},
    )  # fmt: skip
    assert run.metrics["pearson"] > 0.3


GENERATE = """
import json, sys, inlay, inlay.models
opened = inlay.models.open("smollm2-135m-instruct", "causal-lm")
if sys.argv[1] != "base":
    inlay.load(opened.model, sys.argv[1])
model, tokenizer = opened.model.eval(), opened.processor
chat = [{"role": "user", "content": "Name three colours."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
print("TOKENS", json.dumps(out[0].tolist()))
"""


def generated(folder) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GENERATE, str(folder)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.split("TOKENS ")[1])


def test_smollm2_learns_instructions_and_generates_the_same_tokens_elsewhere(tmp_path):
    run = trained(
        tmp_path, model="smollm2-135m-instruct", data="instructlab", method="lora", where=["all-linear"],
        steps=16, batch=2, max_length=96, learning_rate=2e-3, warmup=0.0,
        limit={"train": 16, "validation": 4, "test": 4},
    )  # fmt: skip
    assert fell(run.curve, 0.8)  # sixteen rows seen twice
    first, second = generated(run.folder), generated(run.folder)
    assert first == second
    assert first != generated("base")


@pytest.mark.parametrize("data", ["cifar10", "cxr"])
def test_dinov2_classifies_images(tmp_path, data):
    run = trained(
        tmp_path, model="dinov2-small", data=data, method="lora", steps=25, batch=16, image_size=56,
        limit={"train": 400, "validation": 20, "test": 100},
    )  # fmt: skip
    chance = {"cifar10": 0.1, "cxr": 0.5}[data]
    assert run.metrics["accuracy"] > 1.3 * chance


@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2"])
def test_convolutions_of_a_real_network_are_adapted_and_merged(tmp_path, name):
    run = trained(
        tmp_path, model=name, data="grocery", method="lora(r=4)", where=["type:Conv2d"], steps=6, batch=8,
        image_size=96, limit={"train": 60, "validation": 14, "test": 14},
    )  # fmt: skip
    assert run.adapter_parameters > 0
    model = run.adapter.model
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted = model(pixels).logits
        run.adapter.merge()
        merged = model(pixels).logits
        run.adapter.unmerge()
        restored = model(pixels).logits
    assert (adapted - merged).abs().max() <= 1e-4 * adapted.abs().max()
    assert torch.equal(adapted, restored)


def test_export_opens_as_an_ordinary_model(tmp_path):
    from transformers import AutoModelForSequenceClassification

    from inlay.core.export import export

    opened = inlay.models.open("minilm", "text-classification", num_labels=6)
    piece = inlay.adapt(opened.model, LoRA(r=4), where=["all-linear"])
    with torch.no_grad():
        for p in piece.parameters():
            p.add_(0.02 * torch.randn_like(p))
    record = export(opened.model, tmp_path / "merged")
    assert record["difference"] <= 1e-5
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    inputs = opened.processor(["What is a fear of worms ?"], return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(plain(**inputs).logits, opened.model.eval()(**inputs).logits, atol=1e-4)
