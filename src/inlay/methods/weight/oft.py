from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from inlay.core.errors import OptionError
from inlay.core.method import option, register
from inlay.core.sites import Site
from inlay.core.transform import Blocks, Map
from inlay.methods.weight.rotations import Rotation, cayley, fitting, neumann, resting, skew


@register
class OFT(Rotation):
    """W′ = W Rᵀ, R = diag(R₁, …, R_n), R_i = (I + S_i)(I − S_i)⁻¹, S_i = −S_iᵀ: the input is rotated in blocks.

    Angles between the rows of W (neurons) and their lengths stay as they are. Trained are the b(b−1)/2 entries of
    each S_i above its diagonal, from zero; n = d_in/b. A convolution's rows are its flattened patches (c_in·k), as in
    the paper; an embedding's vectors are rotated as they come out. `constrained` is the paper's COFT, which keeps
    ‖S_i‖ ≤ ε/√n: the projection is part of the map and is differentiated, while the official code overwrites the
    trained numbers. The official code also stores b×b numbers for each block. PEFT stores what is stored here; where
    it does not use the Neumann series its S has the other sign.
    """

    paper: ClassVar[str] = (
        "Qiu et al. 2023, arXiv 2306.07280 (Neumann series and rotated inputs: Qiu et al. 2025, arXiv 2506.19847)"
    )

    block_size: int = option(default=32, doc="b; where it does not divide the width, the nearest size that does", low=2)
    shared: bool = option(default=False, doc="one R_i for all blocks")
    constrained: bool = option(default=False, doc="COFT: S_i projected to a ball of radius ε/√n")
    epsilon: float = option(default=6e-5, doc="ε of COFT", low=0.0)
    neumann: int = option(
        default=0, doc="terms of the Neumann series in place of the inverse, 5 in OFTv2; 0: exact, R orthogonal", low=0
    )
    dropout: float = option(default=0.0, doc="share of blocks that rest at each training step", low=0.0, high=1.0)

    def validate(self) -> None:
        if self.neumann == 1:
            raise OptionError("OFT: one term of the Neumann series is the identity: use 0 (exact) or at least 2")

    def build(self, site: Site) -> None:
        self.b = fitting(site, self.width(site), self.block_size)
        self.S = nn.Parameter(torch.zeros(self.blocks(site), self.b * (self.b - 1) // 2, dtype=site.dtype))

    def count(self, site: Site) -> int:
        b = fitting(site, self.width(site), self.block_size)
        return (1 if self.shared else self.width(site) // b) * b * (b - 1) // 2

    def blocks(self, site: Site) -> int:
        return 1 if self.shared else self.width(site) // self.b

    def rotation(self) -> Map:
        S = skew(self.S, self.b)
        if self.constrained:
            radius = self.epsilon / S.shape[0] ** 0.5
            S = S * radius / torch.linalg.vector_norm(S, dim=(1, 2), keepdim=True).clamp_min(radius)
        R = neumann(S, self.neumann) if self.neumann else cayley(S)
        return Blocks(resting(R, self.dropout) if self.training and self.dropout else R)

    def left(self) -> Map | None:
        return self.turned() if self.site.is_embedding else None

    def exact_now(self) -> bool:
        return self.dropout == 0.0 or not self.training
