"""A schedule method inside `transformers.Trainer` does what it does in a plain loop, step by step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import inlay
from inlay.methods import AdaLoRA, DeltaLoRA, DyLoRA, LoRA, ReLoRA
from inlay.train.callback import MethodCallback

STEPS = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.down(torch.tanh(self.up(x)))
        return {"loss": (y - labels).square().mean(), "logits": y}


def test_as_in_a_plain_loop(tmp_path: Path) -> None:
    torch.manual_seed(1)
    rows = [{"x": torch.randn(8), "labels": torch.randn(8)} for _ in range(4)]
    batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
    for method in (AdaLoRA(r=4, target=1, start=0.0), DyLoRA(), ReLoRA(of=LoRA(r=2), restarts=1), DeltaLoRA()):
        plain, trained = Net(), Net()
        adapters = [inlay.adapt(model, method, ("up", "down")) for model in (plain, trained)]
        plain.train()
        optimizer = torch.optim.SGD(adapters[0].parameters(), lr=0.1)
        for k in range(STEPS):
            (plain(**batch)["loss"] + inlay.penalty(plain)).backward()
            optimizer.step()
            inlay.step(plain, (k + 1) / STEPS, optimizer)
            optimizer.zero_grad()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, optim="sgd", learning_rate=0.1, report_to=[],
            lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(trained, arguments, train_dataset=rows, callbacks=[MethodCallback()]).train()
        start = Net()
        inlay.adapt(start, method, ("up", "down"))
        for (name, p), q, s in zip(
            plain.inlay.named_parameters(), trained.inlay.parameters(), start.inlay.parameters(), strict=True
        ):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
            assert not torch.equal(q, s), f"{name} has not moved"
