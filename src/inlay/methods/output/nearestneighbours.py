from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.errors import SiteError
from inlay.core.fitted import Features, Fitted, vectors
from inlay.core.levels import Level
from inlay.core.method import option, register
from inlay.core.sites import Site

LEAST = 1e-4
"""The share of the vote that a class without one is given, so that its logarithm is finite."""


@register
class NearestNeighbours(Fitted):
    """logits_c = log Σ_{i ∈ N_k(f(x))} w_i [y_i = c]: the labels of the k training rows with the nearest features.

    Nothing is trained. The bank of training features and labels is what the adapter holds, and it answers in the task
    head's stead: a vote of equals, or weighted by softmax(cos / T) over the neighbours. In a regression the answer is
    the weighted mean of their labels. Fitted by `inlay train` and `inlay compare`; before that the head answers.
    """

    paper: ClassVar[str] = "nearest neighbours on frozen features, k = 20 as in Simoncini et al. 2024, arXiv 2407.10964"
    answers: ClassVar[bool] = True

    k: int = option(default=20, doc="neighbours that vote; all rows where there are fewer", low=1)
    metric: Literal["cosine", "euclidean"] = option(default="cosine", doc="nearest by angle, or by distance")
    temperature: float | None = option(
        default=None,
        doc="T of votes weighted by softmax(−d/T), d = 1 − cos or the distance; null: equal votes",
        low=0.0,
    )
    rows: int = option(default=0, doc="rows in the bank; set when it is filled", low=0)
    width: int = option(default=0, doc="their features; set when it is filled", low=0)

    def build(self, site: Site) -> None:
        self.register_buffer("bank", torch.zeros(self.rows, self.width))
        self.register_buffer("labels", torch.zeros(self.rows))

    def count(self, site: Site) -> int:
        return 0

    @property
    def solves(self) -> bool:
        return True

    def solve(self, train: Features, validation: Features, head: list[Level]) -> None:
        x = train.x.float()
        self.rows, self.width = x.shape
        self.bank, self.labels = F.normalize(x, dim=-1) if self.metric == "cosine" else x, train.labels.float()

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.rows:
            return y
        x = vectors(x)
        if x.shape[:-1] != y.shape[:-1] or x.shape[-1] != self.width:
            raise SiteError(
                f"{self.label()} compares vectors of {self.width} features, one for each answer; '{self.site.path}' "
                f"reads {tuple(x.shape)} and gives {tuple(y.shape)}"
            )
        bank, labels = self.bank.float(), self.labels
        d = 1 - F.normalize(x.float(), dim=-1) @ bank.T if self.metric == "cosine" else torch.cdist(x.float(), bank)
        near, at = d.topk(min(self.k, self.rows), largest=False)
        w = torch.ones_like(near) if not self.temperature else -near / self.temperature
        w = w.softmax(-1)
        if y.shape[-1] == 1:
            return (w * labels[at]).sum(-1, keepdim=True).to(y.dtype)
        votes = torch.zeros(y.shape, device=y.device).scatter_add(-1, labels[at].long(), w)
        return votes.clamp_min(LEAST).log().to(y.dtype)
