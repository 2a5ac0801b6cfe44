"""Never compute what is frozen twice: the features a head sees are computed once when only the head is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.adapter import Adapter
from inlay.core.head import Head
from inlay.data.chat import IGNORED
from inlay.evaluate.predict import Output, Source, whole
from inlay.recipe import Recipe
from inlay.work import Work

_CHUNK = 64  # rows per forward pass while features are computed


def source_for(work: Work, adapter: Adapter, recipe: Recipe) -> Source:
    """The cheapest source that gives what the whole model gives."""
    plain = whole(work)
    if recipe.base_dropout or any(not isinstance(level.method, Head) for level in adapter.levels):
        return plain
    if len(adapter.head) != 1 or work.task == "causal-lm":
        return plain
    source = HeadOnly(work, work.model.get_submodule(adapter.head[0]))
    return source if source.holds() else plain


@dataclass
class HeadOnly(Source):
    """The head on the features that reach it; each split's are computed when first asked for and kept."""

    work: Work
    head: nn.Module
    features: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)

    def batch(self, split: str, indices: list[int]) -> dict[str, Tensor]:
        if split not in self.features:
            self.compute(split)
        chosen = torch.tensor(indices, device=self.work.device)
        return {"features": self.features[split][chosen], "labels": self.labels[split][chosen]}

    def forward(self, batch: dict[str, Tensor]) -> Output:
        with self.work.computing():
            logits = self.head(batch["features"])
            if self.work.task == "regression":
                loss = nn.functional.mse_loss(logits.squeeze(-1), batch["labels"].to(logits.dtype))
            else:
                loss = nn.functional.cross_entropy(logits, batch["labels"], ignore_index=IGNORED)
        return Output(loss, logits)

    @torch.no_grad()
    def compute(self, split: str) -> None:
        """Features and labels of every row of a split, rows of one length together."""
        self.work.model.eval()
        lengths = self.work.lengths(split)
        rows = list(range(len(self.work.rows(split))))
        rows.sort(key=lengths.__getitem__ if lengths is not None else None)
        found, labels = [], []
        for start in range(0, len(rows), _CHUNK):
            batch = self.work.batch(split, rows[start : start + _CHUNK])
            found.append(self.seen(batch)[0])
            labels.append(batch["labels"])
        back = torch.tensor(rows, device=self.work.device).argsort()
        self.features[split], self.labels[split] = torch.cat(found)[back], torch.cat(labels)[back]

    def seen(self, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """(what enters the head, the model's output) in a forward pass of the whole model."""
        inputs: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            with self.work.computing():
                out = self.work.model(**batch)
        finally:
            handle.remove()
        self.calls = len(inputs)
        return inputs[0], out

    @torch.no_grad()
    def holds(self) -> bool:
        """Whether head-on-features is the whole model, found out on a few rows: same logits, same loss."""
        self.work.model.eval()
        batch = self.work.batch("train", list(range(min(4, len(self.work.rows("train"))))))
        features, out = self.seen(batch)
        if self.calls != 1 or features.shape[0] != len(batch["labels"]):
            return False
        mine = self.forward({"features": features, "labels": batch["labels"]})
        return torch.equal(mine.logits, out.logits) and torch.allclose(mine.loss, out.loss.to(mine.loss.dtype))
