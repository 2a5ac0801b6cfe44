"""Dual encoders from files: opened for a class prompt, trained, compared and evaluated like any classifier."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tokens"))
from dual_models import FAMILIES, PROMPT, save, words_tokenizer

import inlay.data
import inlay.models
from inlay.compare import compare
from inlay.core.contexts import Template
from inlay.core.errors import OptionError
from inlay.data.rows import DataError, TextRows
from inlay.evaluate import evaluate
from inlay.models import ModelError
from inlay.recipe import CompareRecipe, Recipe, load_recipe
from inlay.train import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Pictures of one colour each, in a folder per class and split; `other` has classes that training has not."""
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    classes = {"cat": (220, 40, 40), "dog": (40, 220, 40), "red deer": (40, 40, 220)}
    kinds = {"": classes, "other/": {"oak": (90, 60, 10), "truck": (20, 200, 220)}}
    for kind, colours in kinds.items():
        for split, count in (("train", 8), ("validation", 2), ("test", 4)):
            for name, colour in colours.items():
                place = folder / (kind or "same/") / split / name
                place.mkdir(parents=True)
                for i in range(count):
                    noise = torch.randint(-15, 16, (3,), generator=generator).tolist()
                    Image.new("RGB", (8, 8), tuple(c + n for c, n in zip(colour, noise, strict=True))).save(
                        place / f"{i}.png"
                    )
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dual")
    return {family: save(family, folder / family) for family in FAMILIES}


def fields(model: Path, data: Path, output: Path, **more) -> dict:
    return {
        "model": str(model), "data": str(data), "prompt": PROMPT, "output": str(output), "batch": 8, "epochs": 6,
        "evaluate_every": 1000, "checkpoint_every": None,
    } | more  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_opened_for_a_prompt(family, models):
    opened = inlay.models.open(models[family], "image-classification", labels=["cat", "dog"], prompt=PROMPT)
    assert opened.head == []  # nothing is fresh
    assert Template.read(PROMPT, opened.processor.tokenizer).text == PROMPT
    if family != "bert":  # without a prompt, the image tower with a head, as ever
        plain = inlay.models.open(models[family], "image-classification", labels=["cat", "dog"])
        assert plain.head == ["classifier"]


def test_what_does_not_fit(models, tmp_path):
    from tiny_task import make_model

    with pytest.raises(ModelError, match="does not compare images with texts"):
        inlay.models.open(make_model(tmp_path / "bert"), "image-classification", labels=["a", "b"], prompt=PROMPT)
    with pytest.raises(ModelError, match="not for text-classification"):
        inlay.models.open(models["clip"], "text-classification", num_labels=2, prompt=PROMPT)


def test_class_prompts_in_batches(models, photos):
    data = inlay.data.load(photos / "same")
    opened = inlay.models.open(models["clip"], data.task, labels=data.labels, prompt=PROMPT)
    prepared = inlay.data.prepare(data, opened.processor, prompt=PROMPT)
    batch = prepared.collate([prepared.splits["test"][i] for i in range(5)])
    assert batch["pixel_values"].shape == (5, 3, 8, 8)
    assert opened.processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == [
        f"a photo of a {name} ." for name in ("cat", "dog", "red deer")
    ]
    with pytest.raises(OptionError, match="once"):
        inlay.data.prepare(data, opened.processor, prompt="a photo")
    text = inlay.data.Data("t", "regression", {"train": TextRows([])}, None, "", "", "")
    with pytest.raises(DataError, match="prompt has no meaning"):
        inlay.data.prepare(text, words_tokenizer("clip"), prompt=PROMPT)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_saved_evaluated(family, models, photos, tmp_path):
    method = {"method": "coop", "tokens": 4, "init": "words"}
    recipe = load_recipe(fields(models[family], photos / "same", tmp_path / "run", method=method), Recipe)
    trained = train(recipe)
    losses = [point["loss"] for point in trained.curve]
    assert min(losses[1:]) < losses[0]
    assert trained.head_parameters == 0
    assert evaluate(tmp_path / "run") == trained.metrics
    other = inlay.data.load(photos / "other")
    assert set(evaluate(tmp_path / "run", other)) == {"accuracy", "macro_f1", "mcc"}  # other classes, by their names


def test_class_specific_contexts_refuse_other_classes(models, photos, tmp_path):
    method = {"method": "coop", "tokens": 2, "classes": 3}
    train(load_recipe(fields(models["clip"], photos / "same", tmp_path / "run", method=method, epochs=1), Recipe))
    with pytest.raises(OptionError, match="the adapter's labels are"):
        evaluate(tmp_path / "run", inlay.data.load(photos / "other"))


def test_compared(models, photos, tmp_path):
    """Every kind of method on both towers beside the row for which nothing is trained."""
    methods = [
        "cocoop(tokens=2)", "maple", "vpt(tokens=2)", {"method": "lora", "where": ["text.attn.q", "vision.attn.v"]},
        "lorasb",
    ]  # fmt: skip
    given = fields(models["bert"], photos / "same", tmp_path / "run", methods=methods, epochs=1, workers=1)
    result = compare(load_recipe(given, CompareRecipe))
    assert [cell.error for cell in result.cells] == [None] * 6
    first = result.cells[0]
    assert (first.method, first.kind, first.adapter_parameters) == ("Zero-shot", "baseline", 0)
    data = inlay.data.load(photos / "same")
    opened = inlay.models.open(models["bert"], data.task, labels=data.labels, prompt=PROMPT)
    assert evaluate(opened, data, prompt=PROMPT) == first.metrics
    assert "Zero-shot" in (tmp_path / "run" / "table.md").read_text(encoding="utf-8")
