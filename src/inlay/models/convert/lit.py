"""Small dual encoders made here by locked-image tuning (Zhai et al. 2022, arXiv 2111.07991): no registry carries one.

The image tower is an embedded model as it is; every picture is shown to it once. The text tower is MiniLM: its layers
stay as they are too, its pooler and the two projections learn to bring a picture and its caption together. Captions
are those of Tux Paint's stamps (Debian), 785 cut-outs, about half of them photographs; and 2,000 training images of
CIFAR-10, whose labels are not read: ResNet-50 says how much each looks like the 1000 classes of ImageNet, and these
names are its captions. All of it is seeded and takes some minutes of one core.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.models.quiet import quiet

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH = 256
"""Numbers of the space in which images and texts meet."""
VIEWS, PHOTOS, GUESSES = 2, 2000, 10
"""Views of every stamp; unlabelled photographs; ImageNet names that are kept of each."""
STEPS, BATCH, RATE, DROPOUT = 150, 256, 1e-3, 0.3
TEMPLATES = ("{}", "a photo of a {}.", "a picture of a {}.")
"""What captions and names are read in, by turns."""


@dataclass(frozen=True)
class Known:
    """What the towers make of everything, computed once; texts are the states that the pooler reads."""

    stamps: Tensor
    """(stamps, views, e)."""
    captions: Tensor
    """(templates, stamps, d)."""
    same: Tensor
    """Which stamps have one caption (stamps, stamps)."""
    photos: Tensor
    """(photos, e)."""
    guesses: Tensor
    """Shares of the ImageNet names in a photo's caption (photos, 1000)."""
    names: Tensor
    """(templates, 1000, d)."""


def mobilenetv2(archive: Path, folder: Path) -> None:
    """With the best image tower for small photographs; it has no tokens."""
    make(archive, folder, "mobilenetv2", 112)


def dinov2_small(archive: Path, folder: Path) -> None:
    """With a transformer for an image tower, whose weights know natural images less well."""
    make(archive, folder, "dinov2-small", 70)


def make(archive: Path, folder: Path, vision: str, side: int) -> None:
    """Train a dual encoder for images of `side` pixels and leave it in a folder that transformers opens."""
    from transformers import (
        AutoImageProcessor,
        AutoModel,
        AutoTokenizer,
        VisionTextDualEncoderModel,
        VisionTextDualEncoderProcessor,
    )

    from inlay.models.catalogue import fetch

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        images, text = (AutoModel.from_pretrained(fetch(name)).eval() for name in (vision, "minilm"))
        tokenizer = AutoTokenizer.from_pretrained(fetch("minilm"))
        square = {"height": side, "width": side}
        looks = AutoImageProcessor.from_pretrained(
            fetch(vision), backend="pil", size={"shortest_edge": side}, crop_size=square
        )
        known = look(archive, images, looks, text, tokenizer)
        if "hidden_size" not in images.config.to_dict():  # what the class asks an image tower for
            images.config.hidden_size = known.photos.shape[1]
        model = VisionTextDualEncoderModel(vision_model=images, text_model=text)
        model.visual_projection = nn.Linear(known.photos.shape[1], WIDTH, bias=False)
        model.text_projection = nn.Linear(text.config.hidden_size, WIDTH, bias=False)
        model.config.projection_dim = WIDTH
        tune(model, known)
        model.eval().save_pretrained(folder)
        VisionTextDualEncoderProcessor(looks, tokenizer).save_pretrained(folder)


# ---------------------------------------------------------------------- what the locked towers see
def look(archive: Path, images: Any, looks: Any, text: Any, tokenizer: Any) -> Known:
    """Show the locked towers everything."""
    import inlay.data
    from inlay.data.captions import tuxpaint

    stamps = tuxpaint(archive)
    captions = [caption.lower().rstrip(". ").removeprefix("a ").removeprefix("an ") for _, caption in stamps]
    photos = inlay.data.load("cifar10", limit={"train": PHOTOS}).splits["train"]
    side, rng = looks.crop_size["height"], random.Random(0)
    shown = (view(picture, side, rng) for picture, _ in stamps for _ in range(VIEWS))
    guesses, names = guessed(row["image"] for row in photos)
    return Known(
        vectors(images, looks, shown, VIEWS * len(stamps), "stamps").unflatten(0, (len(stamps), VIEWS)),
        states(text, tokenizer, captions),
        torch.tensor([[a == b for a in captions] for b in captions]),
        vectors(images, looks, (row["image"] for row in photos), len(photos), "photographs"),
        guesses,
        states(text, tokenizer, names),
    )


def view(picture: Image, side: int, rng: random.Random) -> Image:
    """A cut-out on a background of four colours that run into each other, often as coarse as a small photograph."""
    from PIL import Image, ImageOps

    corners = Image.new("RGB", (2, 2))
    corners.putdata([(rng.randrange(256), rng.randrange(256), rng.randrange(256)) for _ in range(4)])
    whole = corners.resize((side, side), Image.Resampling.BICUBIC)
    cut = picture.crop(picture.getbbox())
    size = rng.uniform(0.7, 1.15) * side / max(cut.size)
    cut = cut.resize((max(4, round(cut.width * size)), max(4, round(cut.height * size))))
    cut = ImageOps.mirror(cut) if rng.random() < 0.5 else cut
    free, moved = (side - cut.width, side - cut.height), [rng.randint(-side // 12, side // 12) for _ in range(2)]
    whole.paste(cut, (free[0] // 2 + moved[0], free[1] // 2 + moved[1]), cut)
    return whole.resize((32, 32)) if rng.random() < 0.7 else whole


@torch.no_grad()
def vectors(model: Any, looks: Any, pictures: Iterator[Image], count: int, what: str, logits: bool = False) -> Tensor:
    """What a model makes of pictures: pooled vectors, or logits; told on stderr now and then."""
    found: list[Tensor] = []
    batch: list[Image] = []
    for i, picture in enumerate(pictures, 1):
        batch.append(picture.convert("RGB"))
        if len(batch) == 50 or i == count:
            out = model(pixel_values=looks(batch, return_tensors="pt")["pixel_values"])
            found.append(out.logits if logits else out.pooler_output)
            batch = []
        if i % 500 == 0:
            print(f"inlay: {i} of {count} {what} seen", file=sys.stderr, flush=True)
    return torch.cat(found)


def guessed(photos: Iterator[Image]) -> tuple[Tensor, list[str]]:
    """How much photographs look like the classes of ImageNet, by ResNet-50: the best few, and all their names."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from inlay.models.catalogue import fetch

    source = fetch("resnet50")
    model = AutoModelForImageClassification.from_pretrained(source).eval()
    square = {"height": 112, "width": 112}
    looks = AutoImageProcessor.from_pretrained(source, backend="pil", size={"shortest_edge": 112}, crop_size=square)
    best, which = vectors(model, looks, photos, PHOTOS, "photographs described", logits=True).softmax(1).topk(GUESSES)
    shares = torch.zeros(len(best), model.config.num_labels).scatter(1, which, best)
    return shares / shares.sum(1, keepdim=True), [model.config.id2label[i] for i in range(model.config.num_labels)]


@torch.no_grad()
def states(text: Any, tokenizer: Any, names: list[str]) -> Tensor:
    """The states of the first token, which the pooler reads (templates, names, d)."""
    found = []
    for template in TEMPLATES:
        texts = [template.format(name) for name in names]
        parts = [texts[start : start + 64] for start in range(0, len(texts), 64)]
        made = (tokenizer(part, padding=True, truncation=True, max_length=32, return_tensors="pt") for part in parts)
        found.append(torch.cat([text(**ids).last_hidden_state[:, 0] for ids in made]))
    return torch.stack(found)


# ---------------------------------------------------------------------- what learns
def tune(model: Any, known: Known) -> None:
    """Let pooler and projections bring together a stamp and its caption, a photograph and the names it was given."""
    dense = model.text_model.pooler.dense
    fresh = [model.text_projection.weight, model.visual_projection.weight, model.logit_scale]
    groups: list[dict[str, Any]] = [{"params": list(dense.parameters()), "lr": RATE / 10}, {"params": fresh}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 20) * (1 - i / STEPS))

    def read(x: Tensor) -> Tensor:
        return F.normalize(model.text_projection(torch.tanh(dense(x))), dim=-1)

    def seen(x: Tensor) -> Tensor:
        return F.normalize(model.visual_projection(F.dropout(x, DROPOUT)), dim=-1)

    for step in range(STEPS):
        scale, words = model.logit_scale.exp().clamp(max=100), step % len(TEMPLATES)
        rows = torch.randperm(len(known.stamps))[:BATCH]
        pictures = seen(known.stamps[rows, torch.randint(VIEWS, (len(rows),))])
        likeness = scale * pictures @ read(known.captions[words, rows]).T
        right = known.same[rows][:, rows].float()
        right = right / right.sum(1, keepdim=True)
        loss = (F.cross_entropy(likeness, right) + F.cross_entropy(likeness.T, right)) / 2
        some = torch.randperm(len(known.photos))[:BATCH]
        named = scale * seen(known.photos[some]) @ read(known.names[words]).T
        loss = loss + F.cross_entropy(named, known.guesses[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
