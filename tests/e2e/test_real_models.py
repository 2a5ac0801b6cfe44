"""Real pretrained models on real data, from a recipe to an adapter that loads anywhere."""

import json
import subprocess
import sys

import pytest
import torch

import inlay
import inlay.data
import inlay.models
from inlay.evaluate import evaluate, open_adapter
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
    run = trained(
        tmp_path, model="minilm", data="trec", method="lora", steps=100, batch=16, limit={"validation": 20, "test": 200}
    )
    assert run.metrics["accuracy"] > 0.6  # the commonest class is 0.23
    again = evaluate(run.folder)
    assert again["accuracy"] == pytest.approx(run.metrics["accuracy"])


def test_minilm_scores_sentence_similarity(tmp_path):
    run = trained(
        tmp_path, model="minilm", data="stsb", method="lora", steps=80, batch=16, max_length=48,
        limit={"validation": 20, "test": 200},
    )  # fmt: skip
    assert run.metrics["pearson"] > 0.6
    assert run.curve[0]["loss"] < 4  # a guess of the mean costs the labels' variance, 2.1; a guess of zero 9.4


@pytest.mark.slow  # minutes: the defaults as a user meets them
def test_minilm_scores_sentence_similarity_well_with_the_defaults(tmp_path):
    run = trained(tmp_path, model="minilm", data="stsb", method="lora", steps=200, limit={"validation": 20})
    assert run.metrics["pearson"] > 0.75


CHAT = [{"role": "user", "content": "Name three colours."}]
GENERATE = """
import json, sys, torch, inlay, inlay.models
torch.set_num_threads(1)
opened = inlay.models.open("smollm2-135m-instruct", "causal-lm")
inlay.load(opened.model, sys.argv[1])
inputs = opened.processor.apply_chat_template(
    json.loads(sys.argv[2]), add_generation_prompt=True, return_tensors="pt", return_dict=True
)
out = opened.model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
print("TOKENS", json.dumps(out[0].tolist()))
"""


def generated(model, tokenizer) -> list[int]:
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()


def generated_elsewhere(folder) -> list[int]:
    """The same in a process of its own, from the saved adapter."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GENERATE, str(folder), json.dumps(CHAT)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.split("TOKENS ")[1])


def test_smollm2_learns_instructions_and_generates_the_same_tokens_elsewhere(tmp_path):
    run = trained(
        tmp_path, model="smollm2-135m-instruct", data="instructlab", method="lora", where=["all-linear"],
        steps=12, batch=2, max_length=96, learning_rate=2e-3, warmup=0.0,
        limit={"train": 12, "validation": 4, "test": 4},
    )  # fmt: skip
    assert fell(run.curve, 0.8)  # twelve rows seen twice
    model, tokenizer = run.adapter.model, inlay.models.open("smollm2-135m-instruct", "causal-lm").processor
    here = generated(model, tokenizer)
    assert generated_elsewhere(run.folder) == here
    with inlay.disabled(model):
        assert generated(model, tokenizer) != here


@pytest.mark.parametrize("data", ["cifar10", "cxr"])
def test_dinov2_classifies_images(tmp_path, data):
    run = trained(
        tmp_path, model="dinov2-small", data=data, method="lora", steps=25, batch=16, image_size=56,
        limit={"train": 400, "validation": 20, "test": 100},
    )  # fmt: skip
    assert run.metrics["accuracy"] > {"cifar10": 0.4, "cxr": 0.8}[data]  # chance, classes balanced: 0.1 and 0.5


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


def test_running_statistics_of_a_real_network_belong_to_base_or_adapter(tmp_path):
    """MobileNetV2's 52 BatchNorms: those of the base hold still, adapted ones are shipped with the adapter."""
    base = inlay.models.open("mobilenetv2", "image-classification", num_labels=2).model
    run = trained(
        tmp_path, model="mobilenetv2", data="grocery", method={"normtuning": {"statistics": "adapted"}}, steps=4,
        batch=8, image_size=96, limit={"train": 40, "validation": 14, "test": 14},
    )  # fmt: skip
    model = run.adapter.model
    now = dict(model.named_buffers())
    statistics = {name: t for name, t in base.named_buffers() if "running" in name}
    assert len(statistics) == 2 * 52
    assert all(torch.equal(now[name], t) for name, t in statistics.items())
    layers = [level for level in run.adapter.levels if level.method.states()]
    assert len(layers) == 52
    for level in layers:
        for name in ("running_mean", "running_var"):
            assert not torch.equal(level.method.states()[name], statistics[f"{level.site.path}.{name}"])
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    opened, _ = open_adapter(run.folder)
    with torch.no_grad():
        adapted = model(pixels).logits
        assert torch.equal(opened.model(pixels).logits, adapted)
        run.adapter.merge()
        torch.testing.assert_close(model(pixels).logits, adapted, rtol=1e-4, atol=1e-4)
        run.adapter.unmerge()
        assert torch.equal(model(pixels).logits, adapted)


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
