"""Greedy answers of a language model, and whether they are right."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from inlay.core.errors import OptionError
from inlay.data.chat import render

if TYPE_CHECKING:
    from inlay.work import Work

Chat = list[dict[str, str]]


def exact_match(work: Work, split: str, batch: int, max_new_tokens: int) -> float:
    """Share of rows whose generated answer is right, see `right`."""
    if work.task != "causal-lm":
        raise OptionError(f"generate has no meaning for {work.task}")
    rows = list(work.data.splits[split])
    prompts = [row["messages"][:-1] for row in rows]
    answers = generate(work, prompts, batch, max_new_tokens)
    return sum(right(answer, row) for answer, row in zip(answers, rows, strict=True)) / len(rows)


@torch.no_grad()
def generate(work: Work, prompts: Sequence[Chat], batch: int = 32, max_new_tokens: int = 256) -> list[str]:
    """The model's greedy answer to each chat; prompts of similar length go together, padded on the left.

    Answers end where the model's context does; a prompt that fills it has an empty one.
    """
    model: Any = work.model.eval()
    tokenizer, template = work.opened.processor, work.prepared.template
    assert template is not None
    encoded = [
        tokenizer(render(tokenizer, chat, template, prompt=True), add_special_tokens=False)["input_ids"]
        for chat in prompts
    ]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers = [""] * len(encoded)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    context = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    order = [i for i in order if len(encoded[i]) < context]
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        longest = max(len(encoded[i]) for i in chosen)
        ids = torch.tensor([[pad] * (longest - len(encoded[i])) + encoded[i] for i in chosen])
        mask = torch.tensor([[0] * (longest - len(encoded[i])) + [1] * len(encoded[i]) for i in chosen])
        with work.computing():
            out = model.generate(
                input_ids=ids.to(work.device), attention_mask=mask.to(work.device), do_sample=False,
                max_new_tokens=min(max_new_tokens, context - longest), pad_token_id=pad,
            )  # fmt: skip
        for i, row in zip(chosen, out[:, longest:].cpu(), strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers


def right(answer: str, row: dict[str, Any]) -> bool:
    """Where the row carries a `final` number, the answer's last one equals it; else the texts are equal."""
    if "final" in row:
        number = last_number(answer)
        return number is not None and number == last_number(row["final"])
    return " ".join(answer.split()) == " ".join(row["messages"][-1]["content"].split())


def last_number(text: str) -> float | None:
    """The number after `####`, as GSM8K writes its result, else the last one in the text."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.rpartition("####")[2])
    return float(numbers[-1].replace(",", "")) if numbers else None
