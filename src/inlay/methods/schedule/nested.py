"""What methods share that act on the training of another method's low-rank update."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from inlay.core.errors import OptionError, SiteError
from inlay.core.matrices import LowRank
from inlay.core.method import DeltaMethod, option
from inlay.core.sites import Site
from inlay.methods.weight.lora import LoRA


class OverLowRank(DeltaMethod):
    """A method over any other whose update is a product s·B A; its own `delta` is made of that product."""

    kind: ClassVar[str] = "schedule"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 3e-3

    of: DeltaMethod = option(default=LoRA(), doc="the low-rank update that is trained")

    def validate(self) -> None:
        if self.of.dropout:
            raise OptionError(f"give dropout to {type(self).__name__}, not to {self.of.label()} inside it")

    def count(self, site: Site) -> int:
        return self.of.count(site)

    def triplets(self) -> int:
        return self.of.triplets()

    def begin_at(self, U: Tensor, S: Tensor, V: Tensor) -> None:
        self.of.begin_at(U, S, V)

    def inner(self) -> LowRank:
        """s·B A."""
        if self.of.kind == self.kind:
            raise SiteError(
                f"{type(self).__name__} decides what is trained of its update at each step, and so does "
                f"{self.of.label()}: keep one of them"
            )
        if self.of.shares:
            raise SiteError(f"{type(self).__name__} acts place by place, {self.of.label()} trains one tensor for all")
        update = self.of.delta()
        if not isinstance(update, LowRank):
            raise SiteError(f"{type(self).__name__} needs an update B A, which {self.of.label()} does not have")
        return update

    def bias_of(self, b: Tensor | None) -> Tensor | None:
        return self.of.bias_of(b)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.site.add(self.delta(), self.drop(x), y)
        bias = self.site.current_bias
        moved = self.of.bias_of(bias)
        return y if bias is None or moved is None else y + self.site.outward(moved - bias, y)
