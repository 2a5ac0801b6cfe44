from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.errors import AdapterError, SiteError
from inlay.core.method import option, register, uniform
from inlay.core.sites import Site
from inlay.core.towers import arguments
from inlay.methods.tokens.words import WordedPrompt


@register
class DePT(WordedPrompt):
    """X′ = [P; X + s·A[0…n) B] with a short prompt P, and low-rank changes of the input embeddings by position.

    Decomposed prompt tuning: P (m, d), A (S, r), B (r, d) and s = α/√r hold the numbers of a prompt of m + S·r/d + r
    tokens and make the sequence longer by m only. The change depends on where a token stands among the user's tokens
    (padding before them is not counted), whatever it is, and goes on through generation; it is zero at the start. More
    than S tokens are refused. A and B learn at `ratio` times the rate of P: the paper's rates are 0.3 and 5·10⁻³.
    """

    paper: ClassVar[str] = "Shi & Lipani 2023, arXiv 2309.05173"
    learning_rate: ClassVar[float] = 1e-1

    tokens: int = option(default=40, doc="virtual tokens m", low=1)
    r: int = option(default=45, doc="rank of the change", low=1)
    length: int = option(default=256, doc="how many of the user's tokens it reaches, S", low=1)
    alpha: float = option(default=8.0, doc="scale numerator α", low=0.0)
    ratio: float = option(default=1 / 60, doc="rate of A and B as a share of that of P", low=0.0)

    def build(self, site: Site) -> None:
        if "cache_params" in arguments(site.module):
            raise SiteError(
                f"{self.label()} counts tokens, and the state of a {type(site.module).__name__} does not tell how many "
                "it has read: PromptTuning needs no count"
            )
        self.P = nn.Parameter(self.start(site))
        self.A = nn.Parameter(uniform((self.length, self.r), self.r**-0.5).to(site.dtype))
        self.B = nn.Parameter(torch.zeros(self.r, site.features, dtype=site.dtype))

    def count(self, site: Site) -> int:
        """m·d + S·r + r·d."""
        return self.tokens * site.features + self.length * self.r + self.r * site.features

    def optimised(self, name: str) -> dict[str, Any]:
        return {} if name == "P" else {"scale": self.ratio}

    def prompt(self) -> Tensor:
        return self.P

    def added(self, position: Tensor, n: int) -> Tensor:
        if n > self.length:
            raise AdapterError(
                f"{self.label()} at '{self.site.path}' reaches {self.length} tokens and was given {n}: train it with "
                "a greater length=, or shorten the text (max_length)"
            )
        return self.alpha * self.r**-0.5 * self.A[position] @ self.B
