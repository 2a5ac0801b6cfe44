from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.method import PromptMethod, option, register
from inlay.core.sites import Site


@register
class PTuning(PromptMethod):
    """X′ = [P; X] with P = W₂ relu(W₁ LSTM(E)), the p rows of E (p, d) read in both directions.

    P-tuning v1: the virtual tokens are no free vectors but come out of a small network, so that neighbours are learnt
    together. The network is trained with E and folded away when the adapter is saved: what is kept is P (p, d). The
    paper's encoder is an LSTM of two layers with d/2 units in each direction and a perceptron; `encoder="mlp"` is
    PEFT's default, three linear layers with ReLU between them, token by token. All virtual tokens stand before the
    input, as in PEFT. The paper's few-shot runs also train the whole network: `[PTuning(), Full()]`.
    """

    paper: ClassVar[str] = "Liu et al. 2021, arXiv 2103.10385"
    learning_rate: ClassVar[float] = 3e-2

    encoder: Literal["lstm", "mlp"] = option(default="lstm", doc="the network that makes P from E")
    hidden: int = option(default=0, doc="units h, of the LSTM per direction; 0: d/2 for the LSTM, d for the MLP", low=0)
    layers: int = option(default=2, doc="layers of the LSTM", low=1)

    def build(self, site: Site) -> None:
        d = site.features
        h = self.units(d)
        self.E = nn.Parameter(torch.randn(self.tokens, d, dtype=site.dtype))
        if self.encoder == "lstm":
            lstm = nn.LSTM(d, h, self.layers, bidirectional=True, dtype=site.dtype)
            self.lstm = nn.ParameterList(lstm.parameters())  # not the module: Dynamo takes none of torch's RNNs
        self.mlp = nn.ModuleList(nn.Linear(m, n, dtype=site.dtype) for m, n in pairwise(self.widths(d)))

    def units(self, d: int) -> int:
        """h."""
        return self.hidden or (d // 2 if self.encoder == "lstm" else d)

    def widths(self, d: int) -> list[int]:
        """Of the perceptron's layers, the input first."""
        h = self.units(d)
        return [2 * h, 2 * h, d] if self.encoder == "lstm" else [d, h, h, d]

    def count(self, site: Site) -> int:
        """p·d + 2·(4h(d + h) + 8h) + (ℓ − 1)·2·(4h·3h + 8h) + (2h + 1)·2h + (2h + 1)·d; for the MLP its layers."""
        d, w = site.features, self.widths(site.features)
        h, n = self.units(d), self.tokens * d + sum((a + 1) * b for a, b in pairwise(w))
        if self.encoder == "lstm":
            n += sum(2 * (4 * h * (a + h) + 8 * h) for a in [d, *[2 * h] * (self.layers - 1)])
        return n

    def kept(self, site: Site) -> int:
        """Parameters of the saved adapter, p·d."""
        return self.tokens * site.features

    def prompt(self) -> Tensor:
        return self.P if "P" in self._parameters else self.once("prompt", self.made)

    def made(self) -> Tensor:
        """P, out of the encoder."""
        x = self.E if self.encoder == "mlp" else self.read(self.E)
        *inner, last = self.mlp
        for layer in inner:
            x = F.relu(layer(x))
        return last(x)

    def read(self, x: Tensor) -> Tensor:
        """The LSTM over rows, (p, d) ↦ (p, 2h)."""
        weights = list(self.lstm)
        zero = x.new_zeros(2 * self.layers, self.units(x.shape[1]))
        return torch.lstm(x[:, None], (zero[:, None], zero[:, None]), weights, True, self.layers, 0.0, self.training,
                          True, False)[0][:, 0]  # fmt: skip

    # ------------------------------------------------------------------ files hold no encoder
    @torch.no_grad()  # as P is computed in evaluation, to the last bit
    def stored(self) -> dict[str, Tensor]:
        return {"P": self.prompt()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if "P" not in self._parameters:
            self.P = nn.Parameter(torch.empty_like(self.E))
            del self.E, self.mlp
            if self.encoder == "lstm":
                del self.lstm
        super().restore(tensors)
