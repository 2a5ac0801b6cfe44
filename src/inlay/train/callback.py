"""What methods need from `transformers.Trainer` beyond gradients: their penalty, and to be told of every step."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inlay.core.adapter import penalty, step


class MethodCallback(TrainerCallback):
    """Drives methods that act on the run itself (AdaLoRA, DyLoRA, …) inside `transformers.Trainer`.

    `Trainer(…, callbacks=[MethodCallback()])`. The gradient of the methods' penalty is added once per optimizer step,
    after clipping; `inlay.step` is called after each, with the share of the run that is done.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        term = penalty(kwargs["model"])
        if isinstance(term, Tensor):
            term.backward()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step(kwargs["model"], (state.global_step + 1) / state.max_steps, kwargs["optimizer"])
