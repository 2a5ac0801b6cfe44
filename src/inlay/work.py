"""The model and the data of a recipe, opened once and shared by the runs that need the same ones."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from inlay.core.adapter import Adapter, adapt
from inlay.core.contexts import told
from inlay.core.errors import OptionError
from inlay.data import Data, Prepared
from inlay.data.batches import TokenRows
from inlay.data.choices import ChoiceRows
from inlay.data.prepare import image_side
from inlay.models import Opened
from inlay.models.loftq import loftq
from inlay.recipe import Recipe, Settings

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What is trained and on what. `splits` of `prepared` are torch data sets of rows as tensors."""

    opened: Opened
    data: Data
    prepared: Prepared
    device: torch.device
    precision: str

    @property
    def model(self) -> nn.Module:
        return self.opened.model

    @property
    def task(self) -> str:
        return self.data.task

    def rows(self, split: str) -> Any:
        """The data set of one split."""
        if split not in self.prepared.splits:
            raise OptionError(f"{self.data.name} has no split '{split}': {', '.join(self.prepared.splits)}")
        return self.prepared.splits[split]

    def lengths(self, split: str) -> tuple[int, ...] | None:
        """Tokens per row; None for images."""
        rows = self.rows(split)
        return tuple(rows.lengths) if isinstance(rows, TokenRows | ChoiceRows) else None

    def batch(self, split: str, indices: list[int]) -> dict[str, Tensor]:
        """Rows as the model's keyword arguments, on the device."""
        rows = self.rows(split)
        made = self.prepared.collate([rows[i] for i in indices])
        return {name: t.to(self.device, non_blocking=True) for name, t in made.items()}

    def computing(self) -> AbstractContextManager[Any]:
        """The context in which forward passes run."""
        if self.precision == "autocast":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def image_size(self, recipe: Recipe) -> int | tuple[int, int] | None:
        """Of the images that the model is given; None for text."""
        if self.task != "image-classification":
            return None
        processor = self.opened.processor
        return recipe.image_size or image_side(processor if self.prepared.prompt is None else processor.image_processor)

    def attach(self, recipe: Recipe, name: str = "default") -> Adapter:
        """The recipe's methods on the model; every freshly initialised module is trained as part of the head."""
        head = recipe.head
        if head == "auto" and self.opened.head:
            modules = dict(self.model.named_modules())
            loose = [path for path in self.opened.head if path not in modules]
            if loose:
                raise OptionError(
                    f"{self.opened.name} lacks {', '.join(loose)}, single tensors that cannot be trained as a head: "
                    "name the head's modules yourself (head: […])"
                )
            head = list(self.opened.head)
        placements, prompt = recipe.placements(), self.prepared.prompt
        placements = placements if prompt is None else [told(placement, prompt) for placement in placements]
        adapter = adapt(
            self.model, placements, recipe.where, name=name, exclude=recipe.exclude,
            layers=recipe.layers, overrides=recipe.overrides, head=head, seed=recipe.seed,
            image_size=self.image_size(recipe),
        )  # fmt: skip
        if recipe.loftq:
            assert recipe.quantize is not None
            loftq(adapter, recipe.quantize, recipe.loftq, recipe.quantize_group)
        return adapter


@dataclass
class Cache:
    """The last few things made, by what they were made from; older ones are dropped to free their memory."""

    keep: int = 1
    made: OrderedDict[str, Any] = field(default_factory=OrderedDict)

    def get(self, key: Any, make: Callable[[], T]) -> T:
        text = json.dumps(key, sort_keys=True, default=str)
        if text not in self.made:
            while len(self.made) >= self.keep:
                self.made.popitem(last=False)
            self.made[text] = make()
        self.made.move_to_end(text)
        return self.made[text]


@dataclass
class Shared:
    """Caches for runs in one process: one model, one data set, one tokenisation."""

    opened: Cache = field(default_factory=Cache)
    data: Cache = field(default_factory=Cache)
    prepared: Cache = field(default_factory=Cache)


def open_work(recipe: Settings, seed: int = 0, shared: Shared | None = None) -> Work:
    """Open what a recipe names. `seed` is that of a fresh head; data are drawn and split with seed 0 whatever it is."""
    import inlay.data
    import inlay.models

    shared = shared or Shared()
    source = [recipe.data, recipe.columns, recipe.task, recipe.limit]
    data: Data = shared.data.get(
        source, lambda: inlay.data.load(recipe.data, recipe.columns, recipe.task, recipe.limit, seed=0)
    )
    dtype = "bfloat16" if recipe.precision == "bfloat16" else "float32"
    bits, group = (None, None) if recipe.loftq else (recipe.quantize, recipe.quantize_group)
    kept = Cache() if recipe.loftq else shared.opened  # LoftQ quantises the model for one adapter
    opened: Opened = kept.get(
        [recipe.model, data.task, data.labels, dtype, seed, bits, group, recipe.prompt],
        lambda: inlay.models.open(
            recipe.model,
            data.task,
            labels=data.labels,
            dtype=dtype,
            seed=seed,
            quantize=bits,
            quantize_group=group,
            prompt=recipe.prompt,
        ),
    )
    prepared: Prepared = shared.prepared.get(
        [data.fingerprint, opened.source, recipe.max_length, recipe.image_size, recipe.template, recipe.prompt],
        lambda: inlay.data.prepare(
            data, opened.processor, recipe.max_length, recipe.image_size, recipe.template, prompt=recipe.prompt
        ),
    )
    device = device_of(recipe.device)
    opened.model.to(device)
    return Work(opened, data, prepared, device, recipe.precision)


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"unknown device '{name}': auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device '{name}' is asked for, but torch sees no GPU")
    return device
