from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from inlay.core.method import option, register, uniform
from inlay.core.sites import Site
from inlay.core.transform import Map, Reflections, TransformMethod
from inlay.methods.weight.rotations import parts


@register
class ETHERPlus(TransformMethod):
    """W′ = H₁ W H₂, blocks I − u uᵀ/‖u‖² + v vᵀ/‖v‖² in both H: two hyperplanes, which may cancel or only bend.

    Relaxed from ETHER: v starts at −u, which is the base itself, and ‖H − I‖ is at most 2√n. By default on both sides
    of W; a convolution's inputs are its flattened patches, an embedding has its vectors, the output side, alone.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Bini et al. 2024, arXiv 2405.20271"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 1e-2

    blocks: int = option(default=1, doc="n; where it does not divide a width, the nearest number that does", low=1)
    side: Literal["both", "input", "output"] = option(default="both", doc="sides of W on which an H stands")

    def build(self, site: Site) -> None:
        self.u_in, self.v_in = self.normals(site, site.d_in if self.on_input(site) else 0, 1)
        self.u_out, self.v_out = self.normals(site, site.d_out if self.on_output(site) else 0, site.groups)

    def normals(self, site: Site, d: int, groups: int) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """u and v, (n, d/n) each; none for a width of zero."""
        if d == 0:
            return None, None
        n = parts(site, d, self.blocks, groups)
        u = uniform((n, d // n), (n / d) ** 0.5).to(site.dtype)
        return nn.Parameter(u), nn.Parameter(-u)

    def count(self, site: Site) -> int:
        return 2 * (site.d_in * self.on_input(site) + site.d_out * self.on_output(site))

    def on_input(self, site: Site) -> bool:
        return self.side != "output" and not site.is_embedding

    def on_output(self, site: Site) -> bool:
        return self.side != "input" or site.is_embedding

    def turns_input(self) -> bool:
        return self.on_input(self.site)

    def right(self) -> Map | None:
        return bent(self.u_in, self.v_in)

    def left(self) -> Map | None:
        return bent(self.u_out, self.v_out)


def bent(u: Tensor | None, v: Tensor | None) -> Map | None:
    """I − û ûᵀ + v̂ v̂ᵀ."""
    return None if u is None or v is None else Reflections((-1.0, u), (1.0, v))
