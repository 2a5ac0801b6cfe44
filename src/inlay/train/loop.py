"""The training loop: plain PyTorch, resumed bit for bit after a kill at any moment."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.core import active as core
from inlay.core.adapter import Adapter
from inlay.core.calibrate import calibrate
from inlay.core.checkpoint import TENSORS, load
from inlay.core.errors import OptionError, near
from inlay.core.statistics import starts_from_data
from inlay.data.choices import ChoiceRows
from inlay.evaluate.metrics import NAMES, PRIMARY, better
from inlay.evaluate.predict import Source, elements, measure, of_the_right_class, whole
from inlay.models.loftq import loftq_base
from inlay.recipe import Recipe
from inlay.train.about import about
from inlay.train.fitting import Fit, solved
from inlay.train.groups import factor, optimiser, set_rate
from inlay.train.measure import step_memory
from inlay.train.modes import checkpointing, set_training
from inlay.train.order import Order, mixed, split
from inlay.train.progress import Progress, Silent
from inlay.train.shortage import memory_advice, out_of_memory
from inlay.train.source import source_for
from inlay.train.state import Checkpoints, TrainError, claim, load_into, owned, snapshot, write_json
from inlay.train.store import clear
from inlay.train.targets import start_at_labels
from inlay.train.tensorboard import Log
from inlay.work import Shared, Work, open_work

POINTS = 200
"""Points of a learning curve, at most, besides those at evaluations."""


@dataclass(frozen=True)
class Trained:
    """What came out of a run; `result.json` in its folder holds the numbers.

    Attributes:
        adapter: attached to its model, in evaluation mode.
        metrics: on the test rows.
        validation: on the validation rows, of the adapter that was kept.
        curve: `{"step", "epoch", "loss", "rate"}` along the way, with validation metrics where they were measured.
        seconds: wall time of training steps alone (no evaluation, no files).
        steps: optimiser steps taken; fewer than planned after an early stop.
        best_step: the step of the adapter that was kept.
        peak_memory_bytes, saved_for_backward_bytes: see `inlay.train.measure`; of the longest batch.
        file_bytes: of `adapter.safetensors`.
        cache: what was kept of frozen layers' work, see `inlay.train.source.Chosen`; its bytes are in no other figure.
    """

    adapter: Adapter
    folder: Path
    metrics: dict[str, float]
    validation: dict[str, float]
    curve: list[dict[str, Any]]
    seconds: float
    steps: int
    best_step: int
    peak_memory_bytes: int
    saved_for_backward_bytes: int
    file_bytes: int
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter_parameters(self) -> int:
        """Trained numbers of the methods, without the head."""
        return self.adapter.adapter_parameters

    @property
    def head_parameters(self) -> int:
        """Trained numbers of the task head."""
        return self.adapter.head_parameters


def train(recipe: Recipe, progress: Progress | None = None, shared: Shared | None = None) -> Trained:
    """Train an adapter into `recipe.output`, or go on with the run that is there.

    The same call after a kill at any moment ends with the same adapter as an undisturbed run, bit for bit on the CPU;
    after the end it returns what is there. The global random state is left as it was.

    Args:
        progress: told about every step; nothing is shown by default.
        shared: models and data opened by earlier runs of this process, for several runs in a row.

    Raises:
        TrainError: the folder belongs to another recipe or to a running process, memory runs out, the loss is not
        finite.  InlayError: a full disk.  Also what opening models and data and attaching methods raise.
    """
    progress = progress or Silent()
    work = open_work(recipe, recipe.seed, shared)
    metric = metric_of(recipe, work.task)
    if metric == "choice_accuracy" and not isinstance(work.rows("train"), ChoiceRows):
        raise OptionError(f"choice_accuracy is for rows with answers to choose from, {work.data.name} has none")
    folder = Path(recipe.output)
    with owned(folder):
        claim(folder, recipe, work.data.fingerprint)
        finished = folder / "result.json"
        if finished.exists():
            progress.say(f"{folder} is finished: nothing to train")
            loftq_base(work.model, folder)
            adapter = load(work.model, folder)
            work.model.eval()
            numbers = json.loads(finished.read_text(encoding="utf-8"))
            return Trained(adapter=adapter, folder=folder, **numbers)
        clear(folder)
        adapter = work.attach(recipe)
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                if solved(recipe):
                    fit = Fit(recipe, work, adapter, progress)
                    fit.go()
                    return Trained(adapter=adapter, folder=folder, **fit.finish())
                run = Run(recipe, work, adapter, metric, progress)
                run.go()
                return run.finish()
        except BaseException as error:
            core.detach(work.model)
            if out_of_memory(error):
                raise TrainError(memory_advice(recipe, folder)) from error
            raise
        finally:
            clear(folder)
            progress.close()


def metric_of(recipe: Recipe, task: str) -> str:
    """The metric that selects the best adapter."""
    metric = recipe.metric or PRIMARY[task]
    if metric not in NAMES[task]:
        raise OptionError(f"unknown metric '{metric}'{near(metric, NAMES[task])} ({task} has {', '.join(NAMES[task])})")
    return metric


class Run:
    """One run from where its folder stands to its end."""

    def __init__(self, recipe: Recipe, work: Work, adapter: Adapter, metric: str, progress: Progress) -> None:
        self.recipe, self.work, self.adapter, self.metric, self.progress = recipe, work, adapter, metric, progress
        self.folder, self.model = Path(recipe.output), work.model
        self.own = core.attached(work.model).adapters[adapter.name]
        self.unit = 1.0
        if work.task == "regression":
            self.unit = start_at_labels(adapter, work.opened.head, work.data.splits["train"].column("label"))
        self.optimizer = optimiser(adapter, recipe)
        self.order = Order(
            len(work.rows("train")), recipe.batch * recipe.accumulate, recipe.seed,
            work.lengths("train") if recipe.bucket else None,
        )  # fmt: skip
        self.total = recipe.steps or math.ceil(recipe.epochs * self.order.steps_per_epoch)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.own, self.optimizer, recipe.keep_last)
        self.checkpoints.sweep()
        self.saved_bytes, self.step_bytes = self.memory()
        began = time.perf_counter()  # chosen of the fresh adapter, so that a resumed run chooses the same
        chosen = source_for(work, adapter, recipe, self.total / self.order.steps_per_epoch, progress.say)
        self.source: Source = chosen.source
        self.cache = chosen.about
        took = time.perf_counter() - began
        self.state, self.best = self.checkpoints.restore()
        self.state.seconds += took if self.state.step == 0 else 0.0
        if self.state.step == 0 and any(starts_from_data(level.method) for level in adapter.levels):
            self.calibrate()

    def calibrate(self) -> None:
        """Methods that start from data see the batches that training begins with."""
        recipe, work = self.recipe, self.work
        steps = range(math.ceil(recipe.calibration / recipe.accumulate))
        rows = [part for number in steps for part in split(self.order.step(number), recipe.batch)]
        batches = (work.batch("train", part) for part in rows[: recipe.calibration])
        told = time.perf_counter()

        def tell(done: int, total: int | None) -> None:
            nonlocal told
            if time.perf_counter() - told > 5:
                self.progress.say(f"calibrating: batch {done} of {recipe.calibration}")
                told = time.perf_counter()

        with work.computing():
            loss = None if work.prepared.prompt is None else of_the_right_class
            found = calibrate(self.model, batches, loss=loss, progress=tell)
        self.progress.say(str(found))
        self.state.seconds += found.seconds

    # ------------------------------------------------------------------ the loop
    def go(self) -> None:
        """Take the remaining steps."""
        state, recipe = self.state, self.recipe
        self.progress.start(recipe.label(), self.total, state.step)
        if state.step:
            self.progress.say(f"going on from step {state.step}")
        every = max(1, self.total // POINTS)
        if recipe.gradient_checkpointing:
            checkpointing(self.model, True)
        started = time.perf_counter()
        if state.step < self.total and not state.stopped:
            self.source.prepare("train")
        if state.step == 0:
            state.seconds += time.perf_counter() - started  # computing frozen states is part of training
        with Log(self.folder / "logs" if recipe.tensorboard else None, state.step) as log:
            while state.step < self.total and not state.stopped:
                started = time.perf_counter()
                loss, rate = self.step(state.step)
                state.seconds += time.perf_counter() - started
                state.step += 1
                state.loss_sum, state.loss_count = state.loss_sum + loss, state.loss_count + 1
                self.progress.step(state.step, loss, rate)
                evaluated = self.evaluate() if self.due() else {}
                if evaluated or state.step % every == 0:
                    self.point(rate, evaluated)
                    log.write(state.curve[-1])
                if recipe.checkpoint_every and state.step % recipe.checkpoint_every == 0:
                    self.checkpoints.save(state, self.best)
        if recipe.gradient_checkpointing:
            checkpointing(self.model, False)

    def step(self, number: int) -> tuple[float, float]:
        """One optimiser step over `accumulate` batches: (mean loss of its rows, largest learning rate)."""
        recipe, model = self.recipe, self.model
        set_training(model, recipe.base_dropout)
        # dropout and methods draw from a generator that depends on seed and step alone: nothing to save, nothing to
        # be disturbed by evaluation
        torch.manual_seed(mixed(recipe.seed, number, 1))
        rate = set_rate(self.optimizer, factor(recipe.schedule, recipe.warmup, number, self.total))
        batches = [self.source.batch("train", rows) for rows in split(self.order.step(number), recipe.batch)]
        counts = [elements(batch, self.work.task) for batch in batches]
        loss = 0.0
        for batch, count in zip(batches, counts, strict=True):
            share = count / max(1, sum(counts))
            part = self.source.forward(batch).loss * share
            loss += float(part.detach())
            # the penalty belongs to the step, not to its rows: every batch carries its share of it
            (part / self.unit**2 + core.penalty(model) * share).backward()
        if not math.isfinite(loss):
            raise TrainError(f"the loss is {loss} at step {number + 1}: lower the learning rate (now {rate:.1e})")
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), recipe.clip)
        self.optimizer.step()
        core.step(
            model, (number + 1) / self.total, self.optimizer,
            lambda: self.source.forward(batches[0]).loss / self.unit**2,
        )  # fmt: skip
        self.optimizer.zero_grad(set_to_none=True)
        return loss, rate

    def due(self) -> bool:
        """Whether to evaluate now: every so many steps or at the end of an epoch, and at the last step."""
        every = self.recipe.evaluate_every or self.order.steps_per_epoch
        return self.state.step % every == 0 or self.state.step == self.total

    def evaluate(self) -> dict[str, float]:
        """Validation metrics now; remembers the best adapter and decides about stopping."""
        state, recipe = self.state, self.recipe
        found = measure(self.source, self.work, "validation", recipe.evaluate_batch)
        self.progress.evaluated(state.step, found)
        if better(self.metric, found[self.metric], state.best):
            state.best, state.best_step, state.since_best = found[self.metric], state.step, 0
            state.validation = found
            if recipe.patience is not None:
                self.best = snapshot(self.own)
        else:
            state.since_best += 1
        if recipe.patience is None:
            state.validation, state.best_step = found, state.step  # the last adapter is the one that is kept
        elif state.since_best >= recipe.patience:
            state.stopped = True
            self.progress.say(f"stopped at step {state.step}: no better {self.metric} in {recipe.patience} evaluations")
        return found

    def point(self, rate: float, evaluated: dict[str, float]) -> None:
        """A point of the learning curve: the mean loss since the last one."""
        state = self.state
        epoch = state.step / self.order.steps_per_epoch
        mean = state.loss_sum / state.loss_count
        validation = {("validation_loss" if name == "loss" else name): v for name, v in evaluated.items()}
        state.curve.append({"step": state.step, "epoch": round(epoch, 4), "loss": mean, "rate": rate, **validation})
        state.loss_sum, state.loss_count = 0.0, 0

    # ------------------------------------------------------------------ the end
    def finish(self) -> Trained:
        """Keep the best adapter, measure it on the test rows, write everything, drop the checkpoints."""
        state, recipe = self.state, self.recipe
        if self.best is not None:
            load_into(self.own, self.best)
        metrics = measure(self.source, self.work, "test", recipe.evaluate_batch)
        self.adapter.save(str(self.folder), **about(recipe, self.work, metrics, state.validation))
        peak = torch.cuda.max_memory_allocated() if self.work.device.type == "cuda" else self.step_bytes
        numbers: dict[str, Any] = {
            "metrics": metrics, "validation": state.validation, "curve": state.curve, "seconds": state.seconds,
            "steps": state.step, "best_step": state.best_step, "peak_memory_bytes": max(peak, state.peak_memory),
            "saved_for_backward_bytes": self.saved_bytes, "file_bytes": (self.folder / TENSORS).stat().st_size,
            "cache": self.cache,
        }  # fmt: skip
        write_json(self.folder / "result.json", numbers)
        self.checkpoints.clear()
        self.model.eval()
        return Trained(adapter=self.adapter, folder=self.folder, **numbers)

    def memory(self) -> tuple[int, int]:
        """(saved-for-backward bytes, peak bytes) of a step on the longest batch."""
        if self.work.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(self.recipe.seed)
        set_training(self.model, self.recipe.base_dropout)
        if self.recipe.gradient_checkpointing:
            checkpointing(self.model, True)
        before = snapshot(self.own)
        batch = self.work.batch("train", self.order.longest(self.recipe.batch))

        def forward() -> Tensor:
            return whole(self.work).forward(batch).loss

        found = step_memory(forward, self.model, batch, self.optimizer)
        load_into(self.own, before)  # methods that count what they see start afresh
        return found
