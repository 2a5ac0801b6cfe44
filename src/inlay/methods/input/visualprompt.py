from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.errors import AdapterError, SiteError
from inlay.core.method import PixelMethod, option, register
from inlay.core.sites import Site

PAPER_SIZE = 30 / 224
"""Width of the frame over the side of the images in the paper."""


@register
class VisualPrompt(PixelMethod):
    """x′ = x + V, with a trained V (channels, height, width) that is zero but on a frame or on a patch of the image.

    It is added after normalisation and not clamped to what pixels can be. A random patch is somewhere else in every
    forward of training, at one place for the whole batch, and in the middle otherwise, so that a trained model gives
    one answer (the paper's code draws then too). Nothing else of the model changes, so `prompt()` may as well be added
    to images before they are sent to a model that is out of reach, which is exact. V belongs to one size of images:
    `inlay.adapt(…, image_size=…)` where the model's configuration states none or another.
    """

    paper: ClassVar[str] = "Bahng, Jahanian, Sankaranarayanan & Isola 2022, arXiv 2203.17274"
    learning_rate: ClassVar[float] = 3e-2

    shape: Literal["padding", "fixed", "random"] = option(
        default="padding", doc="a frame, a patch in the upper left corner, or a patch at a random place"
    )
    size: int | None = option(
        default=None, doc="pixels q: width of the frame or side of the patch; none: 30 of 224, in proportion", low=1
    )
    init: Literal["zero", "normal"] = option(default="zero", doc="start at the base, or at N(0, 1) as the paper does")

    @property
    def starts_at_base(self) -> bool:
        return self.init == "zero"

    def pieces(self, site: Site) -> dict[str, tuple[int, int, int]]:
        """The shapes of the trained parts of V."""
        assert site.pixels is not None
        (c, H, W), side = site.pixels, min(site.pixels[1:])
        q = max(1, round(PAPER_SIZE * side)) if self.size is None else self.size
        if self.shape != "padding":
            if q > side:
                raise SiteError(f"{self.label()}: a patch of {q} pixels does not fit into images of {H} by {W}")
            return {"patch": (c, q, q)}
        if 2 * q >= side:
            raise SiteError(f"{self.label()}: a frame of {q} pixels leaves nothing of images of {H} by {W}")
        return {"up": (c, q, W), "left": (c, H - 2 * q, q), "right": (c, H - 2 * q, q), "down": (c, q, W)}

    def build(self, site: Site) -> None:
        make = torch.zeros if self.init == "zero" else torch.randn
        self.V = nn.ParameterDict({n: make(shape, dtype=site.dtype) for n, shape in self.pieces(site).items()})

    def count(self, site: Site) -> int:
        """2·c·q·(H + W − 2q) for a frame, c·q² for a patch."""
        return sum(c * h * w for c, h, w in self.pieces(site).values())

    def prompt(self) -> Tensor:
        """V (channels, height, width)."""
        assert self.site.pixels is not None
        c, H, W = self.site.pixels
        if self.shape == "padding":
            up, left, right, down = (self.V[name] for name in ("up", "left", "right", "down"))
            inside = left.new_zeros(c, left.shape[1], W - 2 * left.shape[2])
            return torch.cat([up, torch.cat([left, inside, right], 2), down], 1)
        patch, q = self.V["patch"], self.V["patch"].shape[1]
        rows, columns = (self.start(n - q) + torch.arange(q, device=patch.device) for n in (H, W))
        strip = patch.new_zeros(c, q, W).index_copy(2, columns, patch)
        return patch.new_zeros(c, H, W).index_copy(1, rows, strip)

    def start(self, most: int) -> Tensor | int:
        """Where the patch begins along one side, at most so far."""
        if self.shape == "fixed":
            return 0
        return torch.randint(most + 1, (), device=self.V["patch"].device) if self.training else most // 2

    def before(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.site.pixels:
            given, made = ("×".join(map(str, shape)) for shape in (x.shape[1:], self.site.pixels or ()))
            raise AdapterError(
                f"{self.label()} was made for images of {made} (channels, height, width) and is given {given}: attach "
                f"it with inlay.adapt(…, image_size={tuple(x.shape[2:])})"
            )
        return x + self.prompt().to(x.dtype)
