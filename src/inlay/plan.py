"""What an adapter will cost, before anything is downloaded or trained.

The model is built from its configuration with fake tensors (shapes without storage), the methods are attached to it
as to a real one, and one training step runs on shapes alone. Counts are therefore those of the real run, and the
predicted peak is the largest number of live tensor bytes at any moment of that step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.architectures import configuration
from inlay.core.adapter import Methods, adapt
from inlay.core.errors import OptionError


@dataclass(frozen=True)
class Plan:
    """The cost of an adapter. Bytes are of tensors; the saved file adds about 0.5 KB of description per site."""

    arch: str
    method: str
    sites: int
    adapter_parameters: int
    head_parameters: int
    base_parameters: int
    share: float
    """Adapter parameters in percent of the base."""
    adapter_bytes: int
    head_bytes: int
    batch: int
    length: int
    peak_training_bytes: int | None
    """Weights, trained tensors, gradients, AdamW state and activations at the worst moment of a step."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    arch: str,
    methods: Methods,
    where: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    exclude: Sequence[str] = (),
    labels: int = 2,
    batch: int = 32,
    length: int = 128,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    memory: bool = True,
) -> Plan:
    """Predict parameters, bytes on disk and peak training memory of a method on an architecture.

    Args:
        arch: a name in `inlay.architectures`, or a local folder with a `config.json`.
        methods, where, layers, exclude: as for `inlay.adapt`.
        labels: classes of the task head, where the task has one.
        batch, length: rows and tokens of a training batch (images have their architecture's size).
        dtype: type of the base; trained tensors are float32.
        memory: whether to run the step that predicts the peak.
    """
    if batch < 1 or length < 1 or labels < 1:
        raise OptionError("batch, length and labels must be at least 1")
    config, task = configuration(arch, labels)
    with fake():
        model = skeleton(config, task, dtype)
        adapter = adapt(model, methods, list(where) if where else None, layers=layers, exclude=exclude)
        count, head = adapter.adapter_parameters, adapter.head_parameters
        nbytes = sum(p.nbytes for p in adapter.parameters())
        head_bytes = sum(p.nbytes for lv in adapter.levels if lv.head for p in lv.method.parameters())
        sites = sum(not lv.head for lv in adapter.levels)
        base = adapter.base_parameters
        label = " + ".join(p.method.label() for p in adapter.placements)
        peak = step_bytes(model, config, task, batch, length, gradient_checkpointing) if memory else None
    return Plan(
        arch, label, sites, count, head, base, 100 * count / base, nbytes - head_bytes, head_bytes, batch, length, peak
    )


@contextmanager
def fake() -> Iterator[None]:
    """Tensors have shapes and no storage, for as long as the context lasts."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield


def skeleton(config: Any, task: str, dtype: torch.dtype) -> nn.Module:
    """A model of that configuration for the task, of fake tensors when made inside `fake()`."""
    import transformers
    from transformers.initialization import no_init_weights

    auto = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "image-classification": transformers.AutoModelForImageClassification,
        "text-classification": transformers.AutoModelForSequenceClassification,
    }[task]
    with no_init_weights():
        model = auto.from_config(config, dtype=dtype).train()
    model.tie_weights()
    if task == "causal-lm":
        model.loss_type = "ForCausalLM"  # some configurations leave it open, which transformers warns about
    return model


def step_bytes(model: nn.Module, config: Any, task: str, batch: int, length: int, checkpointing: bool) -> int:
    """Largest number of live bytes during one training step with AdamW."""
    from inlay.train.measure import Watch

    if checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    live = Watch(set())
    for t in (*model.parameters(), *model.buffers()):
        live.add(t.untyped_storage())
    with live:
        inputs = example(config, task, batch, length)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=False)
        model(**inputs).loss.backward()
        optimizer.step()
    return live.peak


def example(config: Any, task: str, batch: int, length: int) -> dict[str, Tensor]:
    """A training batch of the right shapes."""
    if task == "image-classification":
        size = getattr(config, "image_size", 224)
        pixels = torch.zeros(batch, getattr(config, "num_channels", 3), size, size)
        return {"pixel_values": pixels, "labels": torch.zeros(batch, dtype=torch.long)}
    ids = torch.zeros(batch, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids if task == "causal-lm" else torch.zeros(batch, dtype=torch.long)}
