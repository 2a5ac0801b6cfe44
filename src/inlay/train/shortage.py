"""Running out of memory: how it is recognised, and what to say about it."""

from __future__ import annotations

from pathlib import Path

import torch

from inlay.recipe import Recipe


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is the lack of memory, of a GPU or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)


def memory_advice(recipe: Recipe, folder: Path) -> str:
    kept = sorted((folder / "checkpoints").glob("step-*.safetensors"))
    left = f"the checkpoint of step {int(kept[-1].stem[5:])} is intact" if kept else "no checkpoint had been written"
    halves = f"batch: {max(1, recipe.batch // 2)} with accumulate: {recipe.accumulate * 2}"
    return (
        f"out of memory with batches of {recipe.batch} rows; {left}. Try {halves} (the same steps), a smaller "
        "max_length or image_size, gradient_checkpointing: true, or precision: bfloat16"
    )
