"""Never compute what is frozen twice: what reaches the lowest trained place is computed once per row and kept.

`inlay.train.headonly` is for a task head that is trained alone, `inlay.train.prefix` for adapters above frozen blocks.
Either is proved on a few rows before it is used: its logits, its loss and its gradients are those of the whole model.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.active import attached
from inlay.core.adapter import Adapter
from inlay.core.modes import evaluating
from inlay.evaluate.predict import Output, Source, whole
from inlay.train.modes import set_training
from inlay.train.order import split as parts_of
from inlay.train.state import load_into, snapshot
from inlay.train.store import FOLDER, Room, Store, Unfit
from inlay.work import Work

CHUNK = 64
"""Rows per forward pass, at most, while states are computed."""
STATES = "states"
"""What a batch calls them, beside arguments of the model."""
KEPT = ("train", "validation")
"""The splits that are gone through again and again; the test rows are met once."""
EXACT, NEAR, ROUGH = (1e-4, 1e-3), (1e-3, 1e-2), (0.1, 0.3)
"""Largest difference of logits and of gradients, relative to the largest logit and to the gradients' norm, that another
order of sums makes: in float32, there on a GPU (convolutions in TF32), and in low precision."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What was kept of a split."""

    states: Store
    labels: Tensor | None
    """One per row; None where states are tokens' and the rows' own tensors go with them."""


@dataclass(frozen=True)
class Outcome:
    """What a source makes of a batch."""

    logits: Tensor
    loss: Tensor
    gradients: Tensor
    """Of all trained tensors, one after the other."""


class Reached(Exception):  # noqa: N818  (no error)
    """A forward pass has come to where it need not go on."""


class Frozen(Source):
    """A part of the model, on states that reach it from frozen layers; each split's are computed once and kept.

    States are vectors, one for each token (kept without padding), or of any one shape, one for each row.
    """

    def __init__(self, work: Work, room: Room, chunk: int, say: Say) -> None:
        self.work, self.room, self.chunk, self.say = work, room, chunk, say
        self.whole, self.on_disk = whole(work), False
        self.found: dict[str, Found] = {}
        with evaluating(work.model):
            batch = work.batch("train", [0])
            states = self.seen(batch)
        self.by_token = tokens(states, batch) is not None
        if states.dim() > 2 and "attention_mask" in batch and not self.by_token:
            raise Unfit(f"{self.name} is no one vector per token")
        self.item, self.dtype = states.shape[2 if self.by_token else 1 :], states.dtype
        self.blank = {name: torch.zeros_like(t[:1]) for name, t in batch.items() if name != "labels"}

    # ------------------------------------------------------------------ what a part of the model says
    @property
    @abstractmethod
    def name(self) -> str:
        """What is kept, in words."""

    @property
    @abstractmethod
    def place(self) -> nn.Module:
        """The module that states enter or leave."""

    @abstractmethod
    def seen(self, batch: dict[str, Tensor]) -> Tensor:
        """The states of a batch (rows, …), in a forward pass without gradients that goes no further."""

    @abstractmethod
    def above(self, batch: dict[str, Tensor]) -> Output:
        """Loss and logits of a batch with states in it."""

    @abstractmethod
    def inputs(self, rows: int) -> dict[str, Tensor]:
        """What stands in a batch for the model's own inputs where states are rows'."""

    # ------------------------------------------------------------------ batches
    def batch(self, split: str, indices: list[int]) -> dict[str, Tensor]:
        if split not in KEPT:
            return self.work.batch(split, indices)
        self.prepare(split)
        found = self.found[split]
        labels = None if found.labels is None else found.labels[indices]
        return self.made(split, indices, found.states.take(indices), labels)

    def forward(self, batch: dict[str, Tensor]) -> Output:
        return self.above(batch) if STATES in batch else self.whole.forward(batch)

    def made(self, split: str, indices: list[int], values: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """A batch with kept `values` in it as `seen` gives them, zero at padding."""
        values = values.to(self.work.device, self.dtype, non_blocking=True)
        if labels is not None:
            return {**self.inputs(len(indices)), "labels": labels.to(self.work.device), STATES: values}
        batch = self.work.batch(split, indices)
        mask = batch["attention_mask"].bool()
        states = values.new_zeros(*mask.shape, *self.item)
        states[mask] = values
        return {**batch, STATES: states}

    # ------------------------------------------------------------------ computing states
    def reserve(self) -> None:
        """Choose memory or disk; Unfit where there is room in neither."""
        self.on_disk = self.room.on_disk(self.bytes)

    @property
    def where(self) -> str:
        """In words."""
        return "on disk" if self.on_disk else "in memory"

    @property
    def bytes(self) -> int:
        """Of everything that is to be kept."""
        each = self.item.numel() * (self.room.dtype or self.dtype).itemsize
        return each * sum(sum(self.counts(split)) for split in KEPT)

    def counts(self, split: str) -> tuple[int, ...]:
        """States per row."""
        lengths = self.work.lengths(split)
        return lengths if self.by_token and lengths is not None else (1,) * len(self.work.rows(split))

    def prepare(self, split: str) -> None:
        """Compute the states of every row of a split, rows of one length together, in evaluation mode."""
        if split in self.found or split not in KEPT:
            return
        lengths, counts, model = self.work.lengths(split), self.counts(split), self.work.model
        file = self.room.folder / FOLDER / f"{split}.bin" if self.on_disk else None
        store = Store(counts, self.item, self.room.dtype or self.dtype, file)
        rows = list(range(len(counts)))
        rows.sort(key=lengths.__getitem__ if lengths is not None else None)
        labels: list[Tensor] = []
        told = time.perf_counter()
        with evaluating(model):
            for part in parts_of(rows, self.chunk):
                values, own = self.values(self.work.batch(split, part))
                store.add(part, values)
                labels += [] if own is None else [own]
                if time.perf_counter() - told > 5:
                    self.say(f"{self.name}: {100 * store.filled // store.total} % of the {split} rows")
                    told = time.perf_counter()
        back = torch.tensor(rows).argsort()
        self.found[split] = Found(store, torch.cat(labels)[back] if labels else None)

    def values(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(states of a batch as they are kept, labels if they are kept beside them)."""
        states = self.seen(batch)
        if not self.by_token:
            return states, batch["labels"].cpu()
        mask = tokens(states, batch)
        if mask is None:
            raise Unfit(f"{self.name} is no one vector per token")
        return states[mask], None

    # ------------------------------------------------------------------ the proof
    def check(self, adapter: Adapter | None = None, base_dropout: bool = False) -> None:
        """Unfit where this is not the whole model, found out on a few rows of each split.

        States are computed row by row, so nothing may hang on padding or on the other rows of a batch. Compared are
        logits and loss; with an adapter, also its gradients, and the states that training mode gives.
        """
        with evaluating(self.work.model):
            if adapter is None:
                return self.prove("train", [])
            own = attached(self.work.model).adapters[adapter.name]
            before = snapshot(own)
            try:
                for split in KEPT:
                    self.prove(split, list(adapter.parameters()))
                self.prove_steady(base_dropout)
            finally:
                load_into(own, before)  # methods that count what they see start afresh

    def prove(self, split: str, trained: Sequence[nn.Parameter]) -> None:
        """The same logits, loss and gradients as those of the whole model."""
        rows = self.few(split)
        batch, again = self.work.batch(split, rows), self.work.batch(split, rows)
        if any(not torch.equal(batch[name], again[name]) for name in batch):
            raise Unfit("a row is not the same when it is read again")
        calls: list[int] = []
        handle = self.place.register_forward_pre_hook(lambda module, args: calls.append(1))
        try:
            expected = outcome(self.whole, batch, trained)
        finally:
            handle.remove()
        singly = [self.values(self.work.batch(split, [row])) for row in rows]
        values, labels = torch.cat([v for v, _ in singly]), [own for _, own in singly if own is not None]
        if len(calls) != 1 or len(values) != (batch["attention_mask"].sum() if self.by_token else len(rows)):
            raise Unfit(f"{self.name} is computed more than once, or not row by row")
        found = outcome(self, self.made(split, rows, values, torch.cat(labels) if labels else None), trained)
        close, closer = self.tolerance
        mask = tokens(expected.logits, batch)
        mine, other = (o.logits if mask is None else o.logits[mask] for o in (found, expected))
        if mine.shape != other.shape or not max(apart(mine, other), apart(found.loss, expected.loss)) <= close:
            raise Unfit(f"from {self.name} alone the model computes something else")
        if not (found.gradients - expected.gradients).norm() <= closer * expected.gradients.norm():
            raise Unfit(f"from {self.name} alone the gradients are others")

    def prove_steady(self, base_dropout: bool) -> None:
        """Training computes the same states as evaluation, and draws no random numbers for them."""
        batch = self.work.batch("train", self.few("train"))
        expected, _ = self.values(batch)
        set_training(self.work.model, base_dropout)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            before = drawn(self.work.device)
            found, _ = self.values(batch)
            random = not torch.equal(before, drawn(self.work.device))
        if random:
            raise Unfit("the frozen layers draw random numbers in training (not with base_dropout: false)")
        if not apart(found, expected) <= self.tolerance[0]:
            raise Unfit("the frozen layers compute something else in training than in evaluation")

    @property
    def tolerance(self) -> tuple[float, float]:
        if self.work.precision != "float32":
            return ROUGH
        return NEAR if self.work.device.type == "cuda" else EXACT

    def few(self, split: str) -> list[int]:
        """The two shortest and the two longest rows among the first."""
        lengths, rows = self.work.lengths(split), list(range(min(64, len(self.work.rows(split)))))
        rows.sort(key=lengths.__getitem__ if lengths is not None else None)
        return sorted({*rows[:2], *rows[-2:]})

    def about(self) -> dict[str, Any]:
        """What is kept, and where, for people and programs."""
        dtype = str(self.room.dtype or self.dtype).removeprefix("torch.")
        return {"kept": self.name, "place": self.where, "bytes": self.bytes, "dtype": dtype}


# ---------------------------------------------------------------------- small things
def reached(work: Work, batch: dict[str, Tensor], handle: Any, states: list[Tensor]) -> Tensor:
    """What a hook puts into `states` and ends the forward pass with; `handle` is the hook's."""
    try:
        with suppress(Reached), torch.no_grad(), work.computing():
            work.model(**batch)
    finally:
        handle.remove()
    if not states:
        raise Unfit("a forward pass does not come by there")
    return states[0]


def outcome(source: Source, batch: dict[str, Tensor], trained: Sequence[nn.Parameter]) -> Outcome:
    """Logits, loss and gradients of a batch; no graph is left."""
    with torch.set_grad_enabled(bool(trained)):
        out = source.forward(batch)
    wanted = [p for p in trained if p.requires_grad] if out.loss.requires_grad else []  # a forward may choose
    found = torch.autograd.grad(out.loss, wanted, allow_unused=True, materialize_grads=True) if wanted else ()
    gradients = [g.flatten().float() for g in found]
    return Outcome(out.logits.detach(), out.loss.detach(), torch.cat(gradients) if gradients else torch.zeros(1))


def tokens(states: Tensor, batch: dict[str, Tensor]) -> Tensor | None:
    """Which of the states (rows, tokens, …) are those of real tokens; None where they are no tokens' states."""
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and states.dim() > 2 and mask.shape == states.shape[:2] else None


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    a, b = a.float(), b.float()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def drawn(device: torch.device) -> Tensor:
    """The state of the random generators that a model's layers draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)
