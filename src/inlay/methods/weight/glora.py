from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.method import option, register, uniform
from inlay.core.sites import Site
from inlay.core.transform import FormedMethod


@register
class GLoRA(FormedMethod):
    """W′ = W + W ⊙ A + B,  b′ = b + b ⊙ D + E + W C: scales and shifts of weights, biases and inputs.

    Each of the five is of low rank, a vector, a number, or absent: A and B (d_out, d_in) a product A_d A_u, one number
    a row, or one; C (d_in, 1) low-rank or a vector; D and E (d_out,) a vector or one number. C, D and E are trained
    where the base has a bias to take them. Down factors (and vectors, numbers) start at zero, which is the base
    itself, and up factors Xavier-uniform. The product with A is taken entry by entry, as in the official code and in
    PEFT, since A has the shape of W. The paper trains a supernet whose structure is drawn anew at every step and
    searches it by evolution; here a structure is a choice of options, per place with `overrides`, open to `search`.
    """

    kind: ClassVar[str] = "weight"
    paper: ClassVar[str] = "Chavan et al. 2023, arXiv 2306.07967"
    where: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    learning_rate: ClassVar[float] = 5e-3

    r: int = option(default=4, doc="rank of what is of low rank", low=1)
    A: Literal["lora", "vector", "constant", "none"] = option(default="lora", doc="scale of the weight")
    B: Literal["lora", "vector", "constant", "none"] = option(default="lora", doc="shift of the weight")
    C: Literal["lora", "vector", "none"] = option(default="lora", doc="shift of the input, seen through W")
    D: Literal["vector", "constant", "none"] = option(default="vector", doc="scale of the bias")
    E: Literal["vector", "constant", "none"] = option(default="vector", doc="shift of the bias")

    def build(self, site: Site) -> None:
        for name, kind, rows, columns in self.shapes(site):
            if kind == "lora":
                up = uniform((self.r, columns), (6 / (self.r + columns)) ** 0.5)
                self.register_parameter(f"{name}_d", nn.Parameter(torch.zeros(rows, self.r, dtype=site.dtype)))
                self.register_parameter(f"{name}_u", nn.Parameter(up.to(site.dtype)))
            elif kind != "none":
                n = rows if kind == "vector" else 1
                self.register_parameter(f"{name}_x", nn.Parameter(torch.zeros(n, 1, dtype=site.dtype)))

    def shapes(self, site: Site) -> Sequence[tuple[str, str, int, int]]:
        """Name, kind, rows and columns of each of the five that there are."""
        d_out, d_in = site.shape
        matrices = [("A", self.A, d_out, d_in), ("B", self.B, d_out, d_in)]
        vectors = [("C", self.C, d_in, 1), ("D", self.D, d_out, 1), ("E", self.E, d_out, 1)]
        return matrices if site.bias is None else [*matrices, *vectors]

    def count(self, site: Site) -> int:
        return sum(
            {"lora": self.r * (rows + columns), "vector": rows, "constant": 1, "none": 0}[kind]
            for _, kind, rows, columns in self.shapes(site)
        )

    def support(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """One of the five, of its own shape or one that broadcasts to it; None where it is absent."""
        own = self._parameters
        down, up, x = (own.get(f"{name}_{part}") for part in "dux")
        t = x if down is None or up is None else down @ up
        return None if t is None else t.to(dtype)

    def weight(self, W: Tensor) -> Tensor:
        wide = W.to(torch.promote_types(W.dtype, self.site.dtype))
        A, B = self.support("A", wide.dtype), self.support("B", wide.dtype)
        new = wide if A is None else wide + wide * A
        return (new if B is None else new + B).to(W.dtype)

    def bias_of(self, b: Tensor | None) -> Tensor | None:
        if b is None:
            return None
        wide = b.to(torch.promote_types(b.dtype, self.site.dtype))[:, None]
        C, D, E = (self.support(name, wide.dtype) for name in "CDE")
        new = wide if D is None else wide + wide * D
        new = new if E is None else new + E
        return (new if C is None else new + self.site.weight.to(wide.dtype) @ C)[:, 0].to(b.dtype)
