"""Classes as prompts: what the text tower of a dual encoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from inlay.core.contexts import NAME


def class_prompts(labels: Sequence[str], prompt: str, tokenizer: Any) -> dict[str, Tensor]:
    """The classes' prompts as ids, one row per class, and their mask where the model takes one.

    Underscores in class names are blanks. A model that takes no mask reads its padding and was trained on full length.
    """
    masked = "attention_mask" in tokenizer.model_input_names
    texts = [prompt.replace(NAME, label.replace("_", " ")) for label in labels]
    made = tokenizer(texts, padding=True if masked else "max_length", truncation=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask") if name in made}
