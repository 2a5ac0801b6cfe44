from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from inlay.core.method import option, register, uniform
from inlay.core.sites import Site
from inlay.core.transform import Map, Reflections, TransformMethod
from inlay.methods.weight.rotations import parts


@register
class ETHER(TransformMethod):
    """W′ = W H, H = diag(H₁, …, H_n), H_i = I − 2 u_i u_iᵀ / ‖u_i‖²: the input is reflected in hyperplanes.

    The paper writes H W with W (d_in, d_out), so H meets the input; `side="output"` gives H W for W (d_out, d_in), the
    official code's flip_side. Trained are the normals u (n, d/n), drawn uniformly. A reflection is never near the
    identity, ‖H − I‖ = 2√n whatever u is, so training does not start at the base. The blocks are those of a
    block-diagonal H; the official code on the input side cuts W by rows where n > 1, which is another map. A
    convolution's inputs are its flattened patches; of an embedding the vectors it gives are reflected.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Bini et al. 2024, arXiv 2405.20271"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 1e-2

    blocks: int = option(default=1, doc="n; where it does not divide the width, the nearest number that does", low=1)
    side: Literal["input", "output"] = option(default="input", doc="side of W on which H stands")

    def build(self, site: Site) -> None:
        d = self.count(site)
        n = parts(site, d, self.blocks, 1 if self.on_input(site) else site.groups)
        self.u = nn.Parameter(uniform((n, d // n), (n / d) ** 0.5).to(site.dtype))

    def count(self, site: Site) -> int:
        return site.d_in if self.on_input(site) else site.d_out

    def on_input(self, site: Site) -> bool:
        return self.side == "input" and not site.is_embedding

    @property
    def starts_at_base(self) -> bool:
        return False

    def turns_input(self) -> bool:
        return self.on_input(self.site)

    def right(self) -> Map | None:
        return Reflections((-2.0, self.u)) if self.turns_input() else None

    def left(self) -> Map | None:
        return None if self.turns_input() else Reflections((-2.0, self.u))
