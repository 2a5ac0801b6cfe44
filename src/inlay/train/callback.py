"""What methods need from `transformers.Trainer` beyond gradients: their penalty, and to be told of every step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from inlay.core.active import active_methods, penalty, step
from inlay.core.errors import AdapterError
from inlay.optim import AdamW
from inlay.train.groups import check_per_layer


class MethodCallback(TrainerCallback):
    """Drives methods that act on the run itself (AdaLoRA, DyLoRA, …) inside `transformers.Trainer`.

    `Trainer(…, callbacks=[MethodCallback()])`. The gradient of the methods' penalty is added once per optimizer step,
    after clipping; `inlay.step` is called after each, with the share of the run that is done. Where methods say how
    their tensors are optimised (GaLore), training begins only with the optimizer that listens,
    `Trainer(…, optimizers=(inlay.optimizer(adapter), None))`. Methods that compare losses (IST) are given that of the
    last batch, as the model itself computes it from its labels.
    """

    def __init__(self) -> None:
        self.batch: tuple[tuple, dict[str, Any]] | None = None
        self.watching: RemovableHandle | None = None

    def remember(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep the batch of a training forward."""
        if model.training and torch.is_grad_enabled():
            self.batch = args, kwargs

    def loss(self, model: nn.Module) -> Tensor:
        """The loss of the last batch, computed again."""
        assert self.batch is not None
        args, kwargs = self.batch
        return model(*args, **kwargs)["loss"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_optimizer(args, kwargs["model"], kwargs["optimizer"])
        self.forget()  # of a training that was interrupted
        self.watching = kwargs["model"].register_forward_pre_hook(self.remember, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        term = penalty(kwargs["model"])
        if isinstance(term, Tensor):
            term.backward()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        step(model, (state.global_step + 1) / state.max_steps, kwargs["optimizer"], partial(self.loss, model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.forget()

    def forget(self) -> None:
        """Look at no more batches, and let go of the last one."""
        if self.watching is not None:
            self.watching.remove()
        self.batch = self.watching = None


def check_optimizer(args: TrainingArguments, model: nn.Module, optimizer: Optimizer) -> None:
    """InlayError where Trainer cannot do what methods say about the optimisation of their tensors."""
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, AdamW):
        for method in active_methods(model):
            if any(method.optimised(name) for name, _ in method.named_parameters(recurse=False)):
                raise AdapterError(
                    f"{method.label()} says how its tensors are optimised, and {type(optimizer).__name__} does not "
                    "listen: give Trainer optimizers=(inlay.optimizer(adapter), None)"
                )
    elif optimizer.per_layer:
        wanted = "gradient_accumulation_steps=1", "max_grad_norm=0"
        check_per_layer(args.gradient_accumulation_steps, args.max_grad_norm, wanted)
