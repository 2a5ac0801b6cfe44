"""What orthogonal methods share: where they turn, skew-symmetric blocks, Cayley's map, block sizes that fit."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from inlay.core.errors import SiteError
from inlay.core.sites import Site
from inlay.core.transform import Map, TransformMethod


class Rotation(TransformMethod):
    """W′ = W Rᵀ: the input is rotated; an embedding reads ids, its vectors are rotated as they come out."""

    kind: ClassVar[str] = "weight"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 5e-3

    @abstractmethod
    def rotation(self) -> Map:
        """R, from the left."""

    def width(self, site: Site) -> int:
        """How many coordinates R turns."""
        return site.d_out if site.is_embedding else site.d_in

    def turns_input(self) -> bool:
        return not self.site.is_embedding

    def right(self) -> Map | None:
        return self.turned() if self.turns_input() else None

    def turned(self) -> Map:
        """Rᵀ, made once while nothing trains."""
        return self.once("rotation", lambda: self.rotation().transposed())


def skew(values: Tensor, b: int) -> Tensor:
    """S (n, b, b) with S = −Sᵀ from the entries above the diagonal, row by row: (n, b(b−1)/2)."""
    rows, cols = torch.triu_indices(b, b, 1, device=values.device)
    S = values.new_zeros(values.shape[0], b, b)
    S = S.index_put((torch.arange(values.shape[0], device=values.device)[:, None], rows, cols), values)
    return S - S.mT


def cayley(S: Tensor) -> Tensor:
    """(I + S)(I − S)⁻¹, a rotation for every skew-symmetric S (…, b, b); float32 at least."""
    wide = S.to(torch.promote_types(S.dtype, torch.float32))
    one = torch.eye(S.shape[-1], dtype=wide.dtype, device=S.device)
    return torch.linalg.solve(one - wide, one + wide)  # the two factors commute


def neumann(S: Tensor, terms: int) -> Tensor:
    """(I + S)(I + S + S² + …), the same with the inverse's series cut off: I + 2S + … + 2S^(k−2) + S^(k−1)."""
    R = power = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S)
    for i in range(1, terms):
        power = power @ S
        R = R + (2 if i < terms - 1 else 1) * power
    return R


def fitting(site: Site, d: int, wanted: int, multiple: int = 1) -> int:
    """The block size that divides d and is nearest to the wanted one, the smaller of two; SiteError if none is over 1.

    `multiple`: d must hold a multiple of that many blocks, and blocks of even size where it is over 1.
    """
    sizes = [b for b in range(2, d + 1) if d % (b * multiple) == 0 and (multiple == 1 or b % 2 == 0)]
    if not sizes:
        raise SiteError(
            f"'{site.path}' has {d} features to rotate, which cannot be cut into "
            + ("blocks" if multiple == 1 else f"a multiple of {multiple} blocks of even size")
        )
    return min(sizes, key=lambda b: (abs(b - wanted), b))


def resting(blocks: Tensor, share: float) -> Tensor:
    """The blocks (n, b, b) with int(share · n) of them, drawn anew, replaced by the identity."""
    n = blocks.shape[0]
    rests = torch.randperm(n, device=blocks.device) < int(share * n)
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.where(rests[:, None, None], one, blocks)


def parts(site: Site, d: int, wanted: int, groups: int = 1) -> int:
    """How many parts of at least two features each d is cut into: the number nearest to the wanted one.

    It is a multiple of `groups`, so that no part spans two groups of a convolution; SiteError if there is none.
    """
    numbers = [n for n in range(groups, d // 2 + 1, groups) if d % n == 0]
    if not numbers:
        raise SiteError(f"'{site.path}' has {d} features in {groups} groups, which leaves no two of them to mix")
    return min(numbers, key=lambda n: (abs(n - wanted), n))
