"""A schedule method inside `transformers.Trainer` does what it does in a plain loop, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import inlay
from inlay.core.errors import InlayError
from inlay.methods import IST, AdaLoRA, BitFit, DeltaLoRA, DyLoRA, GaLore, LoRA, ReLoRA
from inlay.train.callback import MethodCallback

STEPS = 6
LEVEL: dict[str, Any] = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.down(torch.tanh(self.up(x)))
        return {"loss": (y - labels).square().mean(), "logits": y}


class Deep(nn.Module):
    """Blocks, for a method that chooses among them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return {"loss": (x - labels).square().mean(), "logits": x}


def examples() -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Four rows, and their batch."""
    torch.manual_seed(1)
    rows = [{"x": torch.randn(8), "labels": torch.randn(8)} for _ in range(4)]
    return rows, {k: torch.stack([row[k] for row in rows]) for k in rows[0]}


def trainer(model: nn.Module, folder: Path, optimizer: Any = None, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        **options,
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=examples()[0], callbacks=[MethodCallback()], optimizers=(optimizer, None)
    )


def adapted(method: Any) -> tuple[nn.Module, inlay.Adapter]:
    model = Net()
    return model, inlay.adapt(model, method, ("up", "down"))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("early", [False, True])
def test_galore_as_in_a_plain_loop(tmp_path: Path, early: bool) -> None:
    """The library's optimizer takes the same steps in Trainer, and goes on with the same bits from a checkpoint."""
    method = [GaLore(r=3, every=2, per_layer=early), BitFit()]
    plain, adapter = adapted(method)
    optimizer, batch = inlay.optimizer(adapter, 0.02), examples()[1]
    plain.train()
    for k in range(STEPS):
        plain(**batch)["loss"].backward()
        optimizer.step()
        inlay.step(plain, (k + 1) / STEPS, optimizer)
        optimizer.zero_grad()
    model, adapter = adapted(method)
    trainer(model, tmp_path, inlay.optimizer(adapter, 0.02), save_steps=3, **LEVEL).train()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-5, atol=1e-7)
    again, adapter = adapted(method)
    resumed = trainer(again, tmp_path, inlay.optimizer(adapter, 0.02), save_strategy="no", **LEVEL)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(model, again)
    assert not same(model, adapted(method)[0])


def test_ist_as_in_a_plain_loop(tmp_path: Path) -> None:
    """The callback gives the losses that IST compares; what is drawn and weighed survives a checkpoint."""
    method = [LoRA(r=2), IST(every=2, share=0.4)]
    models = [Deep() for _ in range(4)]
    adapters = [inlay.adapt(model, method, ("all-linear",)) for model in models]
    plain, trained, again, untrained = models
    optimizer, batch = inlay.optimizer(adapters[0], 0.02), examples()[1]
    plain.train()
    for k in range(STEPS):
        plain(**batch)["loss"].backward()
        optimizer.step()
        inlay.step(plain, (k + 1) / STEPS, optimizer, lambda: plain(**batch)["loss"])
        optimizer.zero_grad()
    trainer(trained, tmp_path, inlay.optimizer(adapters[1], 0.02), save_steps=3, **LEVEL).train()
    resumed = trainer(again, tmp_path, inlay.optimizer(adapters[2], 0.02), save_strategy="no", **LEVEL)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    importance = [model.inlay.adapters["default"]["ist"].importance for model in models]
    assert importance[1] == pytest.approx(importance[0], rel=1e-4)
    assert importance[1] == importance[2] != importance[3]
    torch.testing.assert_close(list(trained.parameters()), list(plain.parameters()), rtol=1e-5, atol=1e-7)
    assert same(trained, again)
    assert not same(trained, untrained)
    assert len(trained._forward_pre_hooks) == len(plain._forward_pre_hooks), "the callback leaves nothing behind"


def test_trainers_own_optimizer_has_all_that_ist_may_draw(tmp_path: Path) -> None:
    """Trainer takes the tensors that ask for gradients when it begins: IST must not have silenced any by then."""
    model = Deep()
    adapter = inlay.adapt(model, [LoRA(r=2), IST()], ("all-linear",))
    seen = trainer(model, tmp_path, save_strategy="no", learning_rate=0.02, **LEVEL)
    seen.train()
    assert sum(len(g["params"]) for g in seen.optimizer.param_groups) == len(list(adapter.parameters()))


def test_rates_of_methods_in_trainer(tmp_path: Path) -> None:
    """LoRA+ and each method's own rate come with the optimizer; Trainer's schedule multiplies them."""
    model, adapter = adapted([LoRA(r=2), BitFit()])
    optimizer = inlay.optimizer(adapter, lora_plus=16)
    rates = {BitFit.learning_rate, LoRA.learning_rate, 16 * LoRA.learning_rate}
    assert {group["lr"] for group in optimizer.param_groups} == rates
    trainer(model, tmp_path, optimizer, save_strategy="no", warmup_steps=0, lr_scheduler_type="linear").train()
    assert {group["initial_lr"] for group in optimizer.param_groups} == rates
    assert all(group["lr"] == 0 for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("options", "own", "reason"),
    [
        ({"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}, True, "gradient_accumulation_steps=1"),
        ({"max_grad_norm": 1.0}, True, "max_grad_norm=0"),
        ({"max_grad_norm": 0.0}, False, r"optimizers=\(inlay.optimizer\(adapter\), None\)"),
    ],
)
def test_what_trainer_cannot_do_is_refused(tmp_path: Path, options: dict[str, Any], own: bool, reason: str) -> None:
    model, adapter = adapted(GaLore(r=3, per_layer=True))
    optimizer = inlay.optimizer(adapter) if own else None
    with pytest.raises(InlayError, match=reason):
        trainer(model, tmp_path, optimizer, save_strategy="no", **options).train()


def test_as_in_a_plain_loop(tmp_path: Path) -> None:
    batch = examples()[1]
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
        trainer(trained, tmp_path, optim="sgd", learning_rate=0.1, save_strategy="no", **LEVEL).train()
        start = Net()
        inlay.adapt(start, method, ("up", "down"))
        for (name, p), q, s in zip(
            plain.inlay.named_parameters(), trained.inlay.parameters(), start.inlay.parameters(), strict=True
        ):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
            assert not torch.equal(q, s), f"{name} has not moved"
