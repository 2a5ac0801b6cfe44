from __future__ import annotations

from math import gcd
from typing import ClassVar

import torch
from torch import Tensor, nn

from inlay.core.errors import SiteError
from inlay.core.matrices import LowRank
from inlay.core.method import DeltaMethod, option, register, uniform
from inlay.core.sites import Site

LOGITS = ("logits_A", "logits_B")


@register
class VBLoRA(DeltaMethod):
    """W′ = W + B A, whose pieces are Σ_{k ∈ top-K(ℓ)} softmax(ℓ_top-K)_k Φ_k.

    One bank Φ of `vectors` vectors of length b serves all sites and is trained with them. The r rows of A are cut into
    d_in/b pieces, the r columns of B into d_out/b, and each piece has logits ℓ of its own over the bank. Φ starts
    U(±0.02), logits N(0, 0.1²), so the start is not quite the base; there is no scale. Of the logits, `compact` saves
    the K that count, as K indices and K − 1 differences: the same outputs, but no other vectors can be chosen later.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Li, Han & Ji 2024, arXiv 2405.15179"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 1e-2
    shares: ClassVar[bool] = True

    r: int = option(default=4, doc="rank", low=1)
    vectors: int = option(default=256, doc="vectors in the bank", low=1)
    length: int = option(default=0, doc="b, which divides all widths; 0: the largest such up to 256", low=0)
    top: int = option(default=2, doc="K, vectors mixed for each piece", low=1)
    bound: float = option(default=0.02, doc="Φ starts uniform between ± this", low=0.0)
    deviation: float = option(default=0.1, doc="of the logits at the start", low=0.0)
    compact: bool = option(default=False, doc="save of the logits what the output depends on")

    @property
    def starts_at_base(self) -> bool:
        return False

    def build(self, site: Site) -> None:
        b = self.piece(site)
        shapes = ((self.r, site.d_in // b, self.vectors), (site.d_out // b, self.r, self.vectors))
        for name, shape in zip(LOGITS, shapes, strict=True):
            self.register_parameter(name, nn.Parameter((self.deviation * torch.randn(shape)).to(site.dtype)))
        bank = nn.Parameter(uniform((self.vectors, b), self.bound).to(site.dtype)) if site.leads else None
        self.register_parameter("own_bank", bank)
        self.leader = site.leader

    def count(self, site: Site) -> int:
        b = self.piece(site)
        return self.vectors * (self.r * (site.d_in + site.d_out) // b + (b if site.leads else 0))

    def piece(self, site: Site) -> int:
        """b; SiteError where it does not divide the widths."""
        common = gcd(*(d for peer in site.peers for d in peer.shape))
        if not self.length:
            return next(b for b in range(min(common, 256), 0, -1) if common % b == 0)
        if common % self.length:
            raise SiteError(
                f"{self.label()}: vectors of length {self.length} do not divide all widths of its places, whose "
                f"greatest common divisor is {common}: take a divisor of that, or length=0"
            )
        return self.length

    @property
    def bank(self) -> nn.Parameter:
        """Φ (vectors, b), which the first of all places holds for them."""
        return self.leader.built[VBLoRA].get_parameter("own_bank")

    def mixed(self, logits: Tensor) -> Tensor:
        """The pieces (…, b) that logits (…, vectors) choose."""
        largest, at = logits.topk(min(self.top, self.vectors), dim=-1)
        return (largest.softmax(-1).unsqueeze(-1) * self.bank[at]).sum(-2)

    def delta(self) -> LowRank:
        A, B = (self.mixed(self.get_parameter(name)) for name in LOGITS)
        return LowRank(B.transpose(1, 2).flatten(0, 1), A.flatten(1))

    # ------------------------------------------------------------------ files
    def stored(self) -> dict[str, Tensor]:
        tensors = super().stored()
        for name in LOGITS if self.compact else ():
            largest, at = tensors.pop(name).detach().topk(min(self.top, self.vectors), dim=-1)
            tensors[f"{name}_below"] = largest[..., 1:] - largest[..., :1]
            tensors[f"{name}_at"] = at.to(torch.uint8 if self.vectors <= 256 else torch.int32)
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        tensors = dict(tensors)
        for name in LOGITS if self.compact else ():
            below, at = tensors.pop(f"{name}_below"), tensors.pop(f"{name}_at")
            logits = torch.full(self.get_parameter(name).shape, -torch.inf, dtype=below.dtype)
            chosen = torch.cat([below.new_zeros(*below.shape[:-1], 1), below], -1)
            tensors[name] = logits.scatter(-1, at.long(), chosen)
        super().restore(tensors)
