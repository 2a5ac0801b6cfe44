"""Methods that are fitted at once instead of trained step by step: features, one call of a solver, metrics."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from inlay.core.adapter import Adapter
from inlay.core.checkpoint import TENSORS
from inlay.core.errors import OptionError, SiteError
from inlay.core.fitted import Features, Fitted, vectors
from inlay.core.head import Head
from inlay.core.levels import Level
from inlay.evaluate.predict import measure
from inlay.recipe import Recipe
from inlay.train.about import about
from inlay.train.frozen import STATES
from inlay.train.headonly import HeadOnly
from inlay.train.measure import forward_memory
from inlay.train.progress import Progress
from inlay.train.state import write_json
from inlay.train.store import Unfit
from inlay.work import Work


def solved(recipe: Recipe) -> bool:
    """Whether the recipe's method is fitted at once; OptionError where it stands beside others."""
    methods = recipe.methods()
    found = [m for m in methods if isinstance(m, Fitted) and m.solves]
    if found and len(methods) > 1:
        raise OptionError(f"{found[0].label()} is fitted to the features of the base as it is: list it alone")
    return bool(found)


class Fit:
    """One fit, with the same numbers to show for it as a training run."""

    def __init__(self, recipe: Recipe, work: Work, adapter: Adapter, progress: Progress) -> None:
        self.recipe, self.work, self.adapter, self.progress = recipe, work, adapter, progress
        specification = recipe.methods()[0]
        built = [level.method for level in adapter.levels if isinstance(level.method, Fitted)]
        found = built[0] if built else specification
        assert isinstance(found, Fitted)
        self.method = found
        self.source = source_of(work, adapter, found)
        self.peak = 0

    def go(self) -> None:
        """Compute features, fit, and remember what that took."""
        self.progress.start(self.recipe.label(), 1, 0)
        began = time.perf_counter()
        train, validation = (self.features(split) for split in ("train", "validation"))
        head = [level for level in self.adapter.levels if isinstance(level.method, Head)]
        self.method.solve(train, validation, head)
        check_affine(self.source, head)
        self.seconds = time.perf_counter() - began
        self.peak = self.memory() + train.x.nbytes + validation.x.nbytes

    def features(self, split: str) -> Features:
        batch = self.source.batch(split, list(range(len(self.work.rows(split)))))
        return Features(vectors(batch[STATES]), batch["labels"])

    def memory(self) -> int:
        """Peak bytes of a forward pass over as many rows as a batch of training has, the longest ones."""
        lengths = self.work.lengths("train")
        rows = list(range(len(self.work.rows("train"))))
        rows.sort(key=lambda i: 0 if lengths is None else -lengths[i])
        batch = self.work.batch("train", rows[: self.recipe.batch])
        with self.work.computing():
            return forward_memory(lambda: self.work.model(**batch), self.work.model, batch)

    def finish(self) -> dict[str, Any]:
        """Measure on validation and test rows and write everything; the numbers of `inlay.train.Trained`."""
        validation, metrics = (
            measure(self.source, self.work, split, self.recipe.evaluate_batch) for split in ("validation", "test")
        )
        folder = Path(self.recipe.output)
        self.progress.evaluated(1, validation)
        self.adapter.save(str(folder), **about(self.recipe, self.work, metrics, validation))
        numbers = {
            "metrics": metrics, "validation": validation, "curve": [], "seconds": self.seconds, "steps": 0,
            "best_step": 0, "peak_memory_bytes": self.peak, "saved_for_backward_bytes": 0,
            "file_bytes": (folder / TENSORS).stat().st_size,
        }  # fmt: skip
        write_json(folder / "result.json", numbers)
        return numbers


def source_of(work: Work, adapter: Adapter, method: Fitted) -> HeadOnly:
    """The features that enter the head; SiteError where they are no vector a row, or do not make the answer alone."""
    if len(adapter.head) != 1 or work.task == "causal-lm":
        raise SiteError(
            f"{method.label()} is for models with one task head, this one has {list(adapter.head) or 'none'}"
        )
    try:
        source = HeadOnly(work, adapter.head[0])
        if vectors(source.seen(work.batch("train", [0]))).dim() != 2:
            raise Unfit("a row has several vectors there")
        source.check()
    except Unfit as reason:
        raise SiteError(
            f"{method.label()} needs one vector of features a row, and '{adapter.head[0]}' of "
            f"{type(work.model).__name__} reads something else ({reason})"
        ) from None
    return source


@torch.no_grad()
def check_affine(source: HeadOnly, head: list[Level]) -> None:
    """SiteError where a fitted head does more with its features than W x + b."""
    values = {level.site.param: level.method.value for level in head if isinstance(level.method, Head)}
    if not values:
        return
    batch = source.batch("train", list(range(min(8, len(source.work.rows("train"))))))
    expected = F.linear(vectors(batch[STATES]), values["weight"], values["bias"])
    found = source.forward(batch).logits
    if not torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise SiteError("the convex solver fits one linear layer, and this head does more: use solver='gradient'")
