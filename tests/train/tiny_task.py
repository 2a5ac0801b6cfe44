"""A tiny BERT with random weights and a task of made-up sentences, as files: what `train` and `compare` need, offline.

As a script: `python tiny_task.py RECIPE.json` trains that recipe, for tests that kill it.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "sings", "near", "under", "over", "the", "a"]
LABELS = {"cat": "feline", "dog": "canine", "bird": "avian"}


def make_model(folder: Path, dropout: float = 0.1) -> str:
    """A BERT of two layers and width 16, and a tokenizer that knows `WORDS`."""
    import torch
    from transformers import BertConfig, BertForPreTraining, BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForPreTraining(config).bert.save_pretrained(folder)
    return str(folder)


def make_data(folder: Path, rows: int = 48, regression: bool = False) -> str:
    """Sentences labelled by the animal in them (or scored by how often `red` occurs), with all three splits."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    for split, count in (("train", rows), ("validation", 12), ("test", 15)):
        lines = ["text,label"]
        for i in range(count):
            animal = list(LABELS)[i % 3]
            words = [chance.choice(WORDS) for _ in range(chance.randint(1, 9))]
            words = [w for w in words if w not in LABELS] + [animal]
            chance.shuffle(words)
            lines.append(f"{' '.join(words)},{words.count('red') + 0.5 if regression else LABELS[animal]}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def recipe_for(folder: Path, **fields: Any) -> dict[str, Any]:
    """A recipe on the files of `make_model` and `make_data`, made there when missing."""
    model, data = folder / "model", folder / "data"
    if not model.exists():
        make_model(model)
    if not data.exists():
        make_data(data)
    return {
        "model": str(model), "data": str(data), "method": "lora(r=2, dropout=0.1)", "epochs": 2, "batch": 8,
        "learning_rate": 0.01, "checkpoint_every": 2, "output": str(folder / "out"), **fields,
    }  # fmt: skip


if __name__ == "__main__":
    from inlay.recipe import Recipe, load_recipe
    from inlay.train import train

    train(load_recipe(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Recipe))
