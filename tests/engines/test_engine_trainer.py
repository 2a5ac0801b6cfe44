"""`transformers.Trainer` and accelerate: the plain loop's steps, checkpoints, resuming, a base that nothing moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from engine_steps import KINDS, RATE, Run, adapted, copied, descend, loss_of, same, train, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import inlay
from laws.benches import benches
from laws.cases import model_of, stir

STEPS = 4


def examples() -> list[dict[str, Tensor]]:
    """The classifier bench's batch as labelled examples."""
    feed = benches()["classifier"].feed()
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(k % 3)}
        for k, (ids, mask) in enumerate(zip(feed["input_ids"], feed["attention_mask"], strict=True))
    ]


def loop(model: nn.Module, steps: int = STEPS) -> Run:
    """The plain loop, on the whole data set at once."""
    batch = {name: torch.stack([e[name] for e in examples()]) for name in examples()[0]}
    return descend(model, lambda: model(**batch).loss, steps)


class Watched(Trainer):
    """Keeps losses and the first step's gradients."""

    def watch(self) -> Run:
        self.found = Run(start=copied(trained(self.model).items()))
        return self.found

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.found.losses.append(loss.detach())
        if not self.found.gradients:
            self.found.gradients = copied((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
        return loss


def trainer(model: nn.Module, folder: Path, plain: bool = True, **options: Any) -> Watched:
    """A trainer with the plain loop's optimizer, or with its own."""
    settings = TrainingArguments(
        str(folder), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=4, max_grad_norm=0.0, report_to=[],
        save_steps=2, logging_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip
    optimizer: Any = (None, None)  # AdamW, whose state must be resumed too
    if plain:
        descent = torch.optim.SGD(trained(model).values(), lr=RATE, momentum=0.9)
        optimizer = descent, torch.optim.lr_scheduler.LambdaLR(descent, lambda step: 1.0)
    return Watched(model, settings, train_dataset=examples(), eval_dataset=examples(), optimizers=optimizer)


def base_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if not name.startswith("inlay.")}


def unmoved(before: dict[str, Tensor], model: nn.Module) -> None:
    after = base_of(model)
    assert before.keys() == after.keys()
    assert all(t.equal(after[name]) for name, t in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_takes_the_same_steps(kind: str, tmp_path: Path) -> None:
    wanted = loop(adapted(KINDS[kind]))
    model = adapted(KINDS[kind])
    before = base_of(model)
    teacher = trainer(model, tmp_path, save_strategy="no", gradient_checkpointing=kind == "positions")
    found = teacher.watch()
    teacher.train()
    found.parameters = copied(trained(model).items())
    same(found, wanted)
    unmoved(before, model)


@pytest.mark.parametrize("kind", ["weight", "prefix", "copies"])
def test_trainer_saves_and_resumes(kind: str, tmp_path: Path) -> None:
    model = adapted(KINDS[kind])
    before = base_of(model)
    first = trainer(model, tmp_path / "whole", plain=False, learning_rate=0.01)
    first.watch()
    first.train()

    again = adapted(KINDS[kind])
    second = trainer(again, tmp_path / "rest", plain=False, learning_rate=0.01)
    resumed = second.watch()
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert len(resumed.losses) == STEPS - 2
    wanted, found = trained(model), trained(again)
    assert wanted.keys() == found.keys()
    assert all(p.equal(found[name]) for name, p in wanted.items())
    assert not any(p.equal(resumed.start[name]) for name, p in found.items() if "self/key/bias" not in name)
    unmoved(before, again)

    second.save_model(str(tmp_path / "saved"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    unmoved(before, plain)


def test_trainer_brings_back_the_best(tmp_path: Path) -> None:
    model = adapted(KINDS["weight"])
    teacher = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
                      metric_for_best_model="loss", greater_is_better=True)  # fmt: skip
    teacher.watch()
    teacher.train()
    worst = adapted(KINDS["weight"])
    wanted = loop(worst, 2).parameters
    assert teacher.state.best_global_step == 2, "the loss falls, and its highest was asked for"
    for name, p in trained(model).items():
        torch.testing.assert_close(p, wanted[name], atol=1e-6, rtol=1e-5)


def test_an_adapter_saved_after_trainer_loads_into_a_plain_model(tmp_path: Path) -> None:
    model = model_of(benches()["classifier"])
    adapter = inlay.adapt(model, KINDS["hidden"])
    stir(adapter, by=0.1)
    teacher = trainer(model, tmp_path / "run", save_strategy="no")
    teacher.watch()
    teacher.train()
    adapter.save(tmp_path / "adapter")
    plain = model_of(benches()["classifier"])
    inlay.load(plain, tmp_path / "adapter")
    feed = benches()["classifier"].feed()
    with torch.no_grad():
        assert loss_of(plain.eval(), feed).equal(loss_of(model.eval(), feed))


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_takes_the_same_steps(kind: str) -> None:
    wanted = loop(adapted(KINDS[kind]), 3)
    model = adapted(KINDS[kind])
    before = base_of(model)
    accelerator = Accelerator(cpu=True)
    parameters, found = trained(model), Run()
    found.start = copied(parameters.items())
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE, momentum=0.9)
    ready, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(examples(), batch_size=4))
    for _ in range(3):
        for batch in loader:
            loss = ready(**batch).loss
            accelerator.backward(loss)
            if not found.gradients:
                found.gradients = copied((n, p.grad) for n, p in parameters.items() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
            found.losses.append(loss.detach())
    found.parameters = copied(parameters.items())
    same(found, wanted)
    unmoved(before, accelerator.unwrap_model(ready))


# ---------------------------------------------------------------------- a base in bfloat16
@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_base_trains_float32_adapters(kind: str) -> None:
    bench = benches()["classifier"]
    model = model_of(bench, torch.bfloat16)
    stir(inlay.adapt(model, KINDS[kind]), by=0.1)
    before = base_of(model)
    found = train(model.train(), bench.feed(torch.bfloat16))
    wanted = train(adapted(KINDS[kind]), bench.feed())
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {g.dtype for g in found.gradients.values()} == {torch.float32}
    assert {t.dtype for t in before.values() if t.is_floating_point()} == {torch.bfloat16}
    whole, rounded = (torch.cat([g.flatten() for g in r.gradients.values()]) for r in (wanted, found))
    assert torch.nn.functional.cosine_similarity(whole, rounded, dim=0) > 0.99
    assert not any(p.equal(found.start[n]) for n, p in found.parameters.items() if "self/key/bias" not in n)
    unmoved(before, model)


def test_trainer_in_bfloat16(tmp_path: Path) -> None:
    model = model_of(benches()["classifier"], torch.bfloat16)
    stir(inlay.adapt(model, KINDS["weight"]), by=0.1)
    before = base_of(model)
    teacher = trainer(model, tmp_path, save_strategy="no", bf16=True)
    found = teacher.watch()
    teacher.train()
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert all(not p.equal(found.start[n]) for n, p in trained(model).items())
    unmoved(before, model)
