"""Tiny random models of several architectures with made-up rows, as the `Work` of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from inlay.data.batches import Collate, TokenRows
from inlay.data.chat import IGNORED
from inlay.data.prepare import Prepared
from inlay.work import Work

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 4, "num_heads": 2, "pad_token_id": 0,
      "eos_token_id": 2, "decoder_start_token_id": 0}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
VISION = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24,
          "image_size": 16, "patch_size": 8}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12, 12, 8], "depths": [1, 1, 1, 1], "layer_type": "basic"}
MAMBA = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "state_size": 4, "pad_token_id": 0}
CLASSIFIERS = {"bert": TEXT, "roberta": TEXT, "t5": T5,
               "distilbert": {"vocab_size": 40, "dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 24}}  # fmt: skip
DECODERS = {"llama": TEXT, "gpt2": GPT2, "gemma2": {**TEXT, "num_key_value_heads": 1, "head_dim": 8}, "mamba": MAMBA}
IMAGES = {"vit": VISION, "dinov2": VISION, "resnet": RESNET}
LENGTHS = (3, 7, 5, 9, 4, 8, 6, 2, 7, 5)


@dataclass(frozen=True)
class Left(Collate):
    """Padding on the left."""

    def __call__(self, items: Sequence[Any]) -> Any:
        batch = super().__call__(items)
        shifts = batch["attention_mask"].sum(1) - batch["attention_mask"].shape[1]
        return {name: torch.stack([row.roll(-int(s)) for row, s in zip(t, shifts, strict=True)]) if t.dim() > 1 else t
                for name, t in batch.items()}  # fmt: skip


class Pictures(Dataset[Any]):
    """Noise with labels; read the same way every time."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(index % 3)}


class Augmented(Pictures):
    """Noise that is drawn again at every reading."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "pixel_values": torch.randn(3, 16, 16)}


def sentences(labelled: bool) -> TokenRows:
    generator = torch.Generator().manual_seed(3)
    rows = [[*torch.randint(3, 40, (n - 1,), generator=generator).tolist(), 2] for n in LENGTHS]
    if labelled:
        return TokenRows({"input_ids": rows}, [i % 3 for i in range(len(rows))])
    return TokenRows({"input_ids": rows, "labels": [[IGNORED, *row[1:]] for row in rows]}, None)


def lively(model: nn.Module) -> nn.Module:
    """Larger random weights, so that wrong positions and masks show."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "mixer" not in name:
                p.normal_(std=0.3 if p.dim() == 4 or "embed" in name or "wte" in name else p.shape[-1] ** -0.5)
    return model.eval()


def work(
    kind: str, left: bool = False, rows: Dataset[Any] | None = None, precision: str = "float32", **more: Any
) -> Work:
    """The task of a kind of model: classes of texts or images, or the next token."""
    torch.manual_seed(7)
    task = "causal-lm" if kind in DECODERS else "image-classification" if kind in IMAGES else "text-classification"
    settings = {**CLASSIFIERS, **DECODERS, **IMAGES}[kind]
    labels = {} if task == "causal-lm" else {"num_labels": 3}
    config = transformers.AutoConfig.for_model(kind, **{**settings, **labels, **more})
    auto = {"causal-lm": transformers.AutoModelForCausalLM,
            "text-classification": transformers.AutoModelForSequenceClassification,
            "image-classification": transformers.AutoModelForImageClassification}[task]  # fmt: skip
    model = lively(auto.from_config(config))
    rows = rows or (Pictures() if kind in IMAGES else sentences(task != "causal-lm"))
    splits = {"train": rows, "validation": rows, "test": rows}
    prepared = Prepared(task, splits, Left() if left else Collate(), None, None, None, "")
    opened: Any = SimpleNamespace(model=model, head=[])
    data: Any = SimpleNamespace(task=task)
    return Work(opened, data, prepared, torch.device("cpu"), "float32")
