"""What an adapter will cost, before anything is downloaded or trained.

The model is built from its configuration with fake tensors (shapes without storage), the methods are attached to it
as to a real one, and one training step runs on shapes alone. Counts are therefore those of the real run, and the
predicted peak is the largest number of live tensor bytes at any moment of that step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.architectures import configuration
from inlay.core.adapter import Adapter, Methods, adapt
from inlay.core.building import find_head
from inlay.core.checkpoint import describe_site, stored_tensors
from inlay.core.dual import is_dual
from inlay.core.errors import OptionError
from inlay.core.files import canonical
from inlay.core.where import Finder
from inlay.evaluate.predict import of_the_right_class
from inlay.models.loftq import base_bytes
from inlay.models.opening import BY_WORDS
from inlay.models.quantise import quantise
from inlay.optim import optimizer as adapter_optimizer

PROMPT = 12
"""Tokens of a class prompt, about as many as "a photo of a golden retriever." has."""
ABOUT_BYTES = 3000
"""What a description says besides its sites: recipe, task, metrics, digests; about 3 kB as `train` writes it."""


@dataclass(frozen=True)
class Plan:
    """The cost of an adapter; `adapter_bytes` and `head_bytes` are of tensors alone."""

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
    file_bytes: int
    """Predicted size of `adapter.safetensors`, with the head and the description."""
    batch: int
    length: int
    """Tokens per row; for images their side in pixels."""
    peak_training_bytes: int | None
    """Weights, trained tensors, gradients, AdamW state and activations at the worst moment of a step, or of a forward
    pass where nothing is trained by steps."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    arch: str,
    methods: Methods,
    where: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    exclude: Sequence[str] = (),
    overrides: dict[str, dict[str, Any]] | None = None,
    head: Literal["auto"] | Sequence[str] | None = "auto",
    task: str | None = None,
    labels: int = 2,
    batch: int = 32,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
    quantize_group: int | None = None,
    loftq: int = 0,
    gradient_checkpointing: bool = False,
    memory: bool = True,
) -> Plan:
    """Predict parameters, bytes on disk and peak training memory of a method on an architecture.

    Args:
        arch: a name in `inlay.architectures`, or a local folder with a `config.json`.
        methods, where, layers, exclude, overrides, head: as for `inlay.adapt`.
        task: one of `TASKS`; by default that of the architecture.
        labels: classes of the task head, where the task has one.
        batch: rows of a training batch.
        length: tokens per row, by default 128 or what the model takes; for images their side in pixels, by default the
            model's own.
        dtype: type of the base; trained tensors are float32.
        quantize, quantize_group: how the base's linear layers are stored, as for `inlay.models.open`.
        loftq: LoftQ's iterations; from two on, the file holds what the base was made with as well.
        memory: whether to run the step that predicts the peak.

    Raises:
        OptionError: an unknown architecture, a task it has no model for, rows it cannot take.  Also what `inlay.adapt`
        raises.
    """
    if batch < 1 or labels < 1 or (length is not None and length < 1):
        raise OptionError("batch, length and labels must be at least 1")
    config, own_task, size = configuration(arch, labels)
    task = task or own_task
    images, most = task in ("image-classification", BY_WORDS), longest(config)
    length = length or (size if images else min(128, most))
    if images:
        check_side(arch, config, length)
    elif length > most:
        raise OptionError(f"{arch} takes {most} tokens at most, and length is {length}")
    with fake():
        model = skeleton(config, task, dtype)
        if quantize is not None:
            quantise(model, quantize, find_head(Finder(model)) if head == "auto" else head or (), quantize_group)
        adapter = adapt(
            model, methods, list(where) if where else None, layers=layers, exclude=exclude, overrides=overrides,
            head=head, image_size=length if images else None,
        )  # fmt: skip
        count, in_head = adapter.adapter_parameters, adapter.head_parameters
        nbytes = sum(p.nbytes for p in adapter.parameters())
        head_bytes = sum(p.nbytes for lv in adapter.levels if lv.head for p in lv.method.parameters())
        sites = sum(not lv.head for lv in adapter.levels)
        base = adapter.base_parameters
        label = " + ".join(p.method.label() for p in adapter.placements)
        written = file_bytes(adapter) + (base_bytes(adapter) if loftq > 1 else 0)
        peak = step_bytes(adapter, config, task, batch, length, gradient_checkpointing) if memory else None
    return Plan(
        arch=arch, method=label, sites=sites, adapter_parameters=count, head_parameters=in_head, base_parameters=base,
        share=100 * count / base, adapter_bytes=nbytes - head_bytes, head_bytes=head_bytes, file_bytes=written,
        batch=batch, length=length, peak_training_bytes=peak,
    )  # fmt: skip


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

    auto: Any = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "image-classification": transformers.AutoModelForImageClassification,
        "text-classification": transformers.AutoModelForSequenceClassification,
        "regression": transformers.AutoModelForSequenceClassification,
        BY_WORDS: transformers.AutoModel,
    }[task]
    if type(config) not in auto._model_mapping:
        raise OptionError(f"transformers has no {task} model of the architecture '{config.model_type}'")
    if task == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    with no_init_weights():
        model = auto.from_config(config, dtype=dtype).train()
    model.tie_weights()
    if task == "causal-lm":
        model.loss_type = "ForCausalLM"  # some configurations leave it open, which transformers warns about
    return model


def step_bytes(adapter: Adapter, config: Any, task: str, batch: int, length: int, checkpointing: bool) -> int:
    """Largest number of live bytes during one training step, the second or a later one."""
    from inlay.train.measure import Watch, forward_memory

    model = adapter.model
    if checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    if not any(True for _ in adapter.parameters()):  # fitted to features, not trained
        inputs = example(config, task, batch, length)
        return forward_memory(lambda: model(**inputs), model, inputs)
    optimizer = adapter_optimizer(adapter)
    for p in adapter.parameters():  # its state is there from the second step on
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    live = Watch(set())
    for t in (*model.parameters(), *model.buffers(), *(t for s in optimizer.state.values() for t in s.values())):
        live.add(t.untyped_storage())
    with live:
        loss_of(model, example(config, task, batch, length)).backward()
        optimizer.step()
    return live.peak


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The loss of a batch; of a dual encoder that of naming each image."""
    if not is_dual(model):
        return model(**inputs).loss
    labels = inputs.pop("labels")
    return of_the_right_class(model(**inputs), {"labels": labels})


def example(config: Any, task: str, batch: int, length: int) -> dict[str, Tensor]:
    """A training batch of the right shapes."""
    if task == "image-classification":
        pixels = torch.zeros(batch, getattr(config, "num_channels", 3), length, length)
        return {"pixel_values": pixels, "labels": torch.zeros(batch, dtype=torch.long)}
    if task == BY_WORDS:
        prompts = torch.zeros(config.num_labels, PROMPT, dtype=torch.long)
        images = example(config.vision_config, "image-classification", batch, length)
        return images | {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    ids = torch.zeros(batch, length, dtype=torch.long)
    if task == "causal-lm":
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids, "labels": torch.zeros(batch, dtype=torch.float if task == "regression" else torch.long)}


def longest(config: Any) -> int:
    """Tokens for which a model has positions; those of rotary models are computed, so they have no end."""
    most = getattr(config, "max_position_embeddings", None)
    if most is None or getattr(config, "rope_parameters", None) is not None:
        return sys.maxsize
    reserved = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0  # begin after the padding index
    return most - reserved


def check_side(arch: str, config: Any, side: int) -> None:
    """OptionError where images cannot be cut into patches."""
    patch = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if isinstance(patch, int) and side % patch:
        raise OptionError(f"{arch} cuts images into patches of {patch} pixels: {side} is no multiple of it")


def file_bytes(adapter: Adapter) -> int:
    """Size of the file that `train` will write: tensors, their table, and the description of every site."""
    tensors = stored_tensors(adapter)
    table = {
        name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [t.nbytes, t.nbytes]}
        for name, t in tensors.items()
    }
    sites = [
        describe_site(lv.site) | {"slot": lv.site.key, "group": 0, "method": lv.method.specification(), "head": False}
        for lv in adapter.levels
    ]
    text = canonical(table) + json.dumps(canonical({"sites": sites}))  # the description is a string in the table
    return sum(t.nbytes for t in tensors.values()) + len(text.encode()) + ABOUT_BYTES
