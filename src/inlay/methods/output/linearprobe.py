from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.errors import OptionError, SiteError
from inlay.core.fitted import Features, Fitted
from inlay.core.head import Head
from inlay.core.levels import Level
from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.methods.output.convex import PENALTIES, Solution, best, logistic, ridge


@register
class LinearProbe(Fitted):
    """logits = W f(x) + b: the task head alone, on frozen features.

    Nothing is attached to the base; the head that every method trains beside itself is all there is. With
    `solver="convex"` a linear head is not trained by gradient steps but solved for: multinomial logistic regression
    (L-BFGS) or ridge regression on features that are computed once, λ on a grid from 10 to 10⁻⁶ by the validation rows'
    loss. The outcome hangs on no rate and no seed, and is saved as the head it is.
    """

    paper: ClassVar[str] = "linear probing"
    mergeable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2

    solver: Literal["gradient", "convex"] = option(
        default="gradient", doc="gradient: AdamW as for any method; convex: the minimum, by `inlay train` and `compare`"
    )
    l2: float | None = option(
        default=None, doc="λ of the convex solver, on standardised features; null: chosen on the validation rows",
        low=0.0,
    )  # fmt: skip

    def validate(self) -> None:
        if self.l2 is not None and self.solver != "convex":
            raise OptionError("LinearProbe: l2 is the convex solver's: solver='convex'")

    def build(self, site: Site) -> None:
        return

    def count(self, site: Site) -> int:
        return 0

    @property
    def solves(self) -> bool:
        return self.solver == "convex"

    def solve(self, train: Features, validation: Features, head: list[Level]) -> None:
        values = {level.site.param: level.method for level in head if isinstance(level.site.module, nn.Linear)}
        if len(head) != len(values) or "weight" not in values:
            kinds = ", ".join(sorted({type(level.site.module).__name__ for level in head})) or "missing"
            raise SiteError(
                f"the convex solver fits one linear layer, and here the head is {kinds}: use solver='gradient'"
            )
        if "bias" not in values:
            raise SiteError("the convex solver fits W and b, and this head has no bias: use solver='gradient'")
        penalties = PENALTIES if self.l2 is None else (self.l2,)
        W = values["weight"]
        assert isinstance(W, Head)
        classes = W.value.shape[0]

        def fit(x: Tensor, l2: float, start: Solution | None) -> Solution:
            if train.labels.is_floating_point():
                return ridge(x, train.labels, l2)
            return logistic(x, train.labels, classes, l2, start)

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            if labels.is_floating_point():
                return F.mse_loss(logits[:, 0], labels.to(logits))
            return F.cross_entropy(logits, labels)

        solution, _ = best(train.x, fit, loss, (validation.x, validation.labels), penalties)
        with torch.no_grad():
            for name, t in zip(("weight", "bias"), solution, strict=True):
                level = values[name]
                assert isinstance(level, Head)
                level.value.copy_(t)
