from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from inlay.core.errors import SiteError
from inlay.core.method import AttentionMethod, Placement, option, register
from inlay.core.rotary import rotaries
from inlay.core.sites import Site
from inlay.methods.weight.full import Full
from inlay.methods.weight.lora import LoRA
from inlay.methods.weight.normtuning import NormTuning

if TYPE_CHECKING:
    from inlay.core.method import Attend


@register
class LongLoRA(AttentionMethod):
    """O = [A_G(Q₁, K₁, V₁); A_{G→G/2}(Q₂, K₂, V₂)] in training, full attention in evaluation; LoRA, norms, embeddings.

    S²-Attn. A_G is causal attention within consecutive groups of G = n/`groups` tokens, for the first half of the
    heads; for the second half the groups begin G/2 later, so that information passes between groups. The cost of
    attention falls from n² to n²/`groups`. n is the length of a sequence without padding, or in a packed row its own.

    Official code rolls the second half by G/2 instead, so that the first G/2 tokens share a group with the last G/2 and
    attend to them, the end of the text: `leak` does so. Beside it are trained LoRA on all four matrices of the
    attention, the input embeddings and the norms, and all are stored in the adapter. `stretch` divides rotary positions
    by s, in evaluation as well, for contexts s times as long as the base's.
    """

    kind: ClassVar[str] = "schedule"
    paper: ClassVar[str] = "Chen et al. 2023, arXiv 2309.12307 (positions: Chen et al. 2023, arXiv 2306.15595)"
    where: ClassVar[tuple[str, ...]] = ("attn",)
    learning_rate: ClassVar[float] = LoRA.learning_rate
    mergeable: ClassVar[bool] = True

    groups: int = option(default=4, doc="groups that a sequence is cut into; 1 is full attention", low=1)
    least: int = option(default=1, doc="tokens of a group at least; shorter sequences are one group", low=1)
    leak: bool = option(default=False, doc="let the first G/2 tokens attend to the last, as official code does")
    r: int = option(default=8, doc="rank of LoRA on attn.q, attn.k, attn.v and attn.o; 0 for none", low=0)
    alpha: float = option(default=16.0, doc="scale numerator α of LoRA", low=0.0)
    dropout: float = option(default=0.0, doc="dropout on the input of LoRA", low=0.0, high=1.0)
    embeddings: bool = option(default=True, doc="train the input embeddings")
    norms: bool = option(default=True, doc="train the norms")

    @property
    def starts_at_base(self) -> bool:
        return self.stretch == 1.0

    def beside(self) -> tuple[Placement, ...]:
        lora = LoRA(r=max(1, self.r), alpha=self.alpha, dropout=self.dropout)
        parts = (
            (self.r > 0, lora.on("attn.q", "attn.k", "attn.v", "attn.o")),
            (self.embeddings, Full().on("embed")),
            (self.norms, NormTuning().on("")),
        )
        return tuple(placement for wanted, placement in parts if wanted)

    def build(self, site: Site) -> None:
        if self.stretch > 1 and not list(rotaries(site)):
            raise SiteError(
                f"{self.label()} stretches rotary positions, and '{site.path}' has none of a single kind: stretch=1"
            )

    def count(self, site: Site) -> int:
        """4·L·r·(d_in + d_out) in LoRA, V·d in the embeddings, the norms' numbers; S²-Attn itself has none."""
        return 0

    def attends(self) -> bool:
        return self.training

    def attend(self, causal: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half, n = q.shape[1] // 2, q.shape[2]
        G = min(max(-(-n // self.groups), self.least), n)
        shift = G // 2 if n > G else 0  # one group is full attention
        first, second = ([t[:, heads] for t in (q, k, v)] for heads in (slice(half), slice(half, None)))
        if self.leak:
            moved = within(G, 0, causal, *(t.roll(-shift, 2) for t in second)).roll(shift, 2)
        else:
            moved = within(G, shift, causal, *second)
        return torch.cat([within(G, 0, causal, *first), moved], 1)


def within(G: int, begin: int, causal: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within [0, begin), [begin, begin + G), [begin + G, begin + 2 G), …, the last maybe shorter."""
    n = q.shape[2]
    whole = (n - begin) // G * G
    lengths = [begin, whole, n - begin - whole]
    parts = zip(*(t.split(lengths, 2) for t in (q, k, v)), lengths, strict=True)
    return torch.cat([folded(min(G, m), causal, q, k, v) for q, k, v, m in parts if m], 2)


def folded(G: int, causal: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within groups of G tokens: the groups are rows of one batch."""
    rows = (t.unflatten(2, (-1, G)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    return causal(*rows).unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2, 3)
