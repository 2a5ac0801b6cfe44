from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.matrices import LowRank
from inlay.core.method import option, register, uniform
from inlay.core.sites import Site
from inlay.methods.weight.ranked import Ranked, begin


@register
class LoRAFA(Ranked):
    """W′ = W + s·B A with A frozen as it was drawn and B alone trained.

    A (r, d_in) is Kaiming-uniform and saved with the adapter, B (d_out, r) starts at zero. The backward pass keeps
    A x, r numbers per token, where LoRA keeps the d_in of x. With `corrected` (the paper's second version) the
    gradient of B is the one whose step comes nearest to that of full fine-tuning: g ← g (A Aᵀ + 10⁻⁸ I)⁺ / s².
    """

    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2308.03303"
    learning_rate: ClassVar[float] = 3e-2

    corrected: bool = option(default=False, doc="correct the gradient of B as the paper's second version does")

    def build(self, site: Site) -> None:
        A = uniform((self.r, site.d_in), site.d_in**-0.5).to(site.dtype)
        self.register_buffer("A", A)
        self.B = nn.Parameter(torch.zeros(site.d_out, self.r, dtype=site.dtype))

    def count(self, site: Site) -> int:
        return self.r * site.d_out

    def delta(self) -> LowRank:
        A = self.get_buffer("A")
        return LowRank(Corrected.apply(self.B, A, self.scale) if self.corrected else self.B, A, self.scale)

    def triplets(self) -> int:
        return self.r

    def begin_at(self, U: Tensor, S: Tensor, V: Tensor) -> None:
        begin(self.delta(), U, S, V)


class Corrected(torch.autograd.Function):
    """B itself, whose gradient is multiplied by (A Aᵀ + 10⁻⁸ I)⁺ / s² from the right."""

    generate_vmap_rule = True

    @staticmethod
    def forward(B: Tensor, A: Tensor, scale: float) -> Tensor:
        return B.view_as(B)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, A, ctx.scale = inputs
        ctx.save_for_backward(A)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        A = ctx.saved_tensors[0].to(torch.promote_types(gradient.dtype, torch.float32))
        near = torch.linalg.pinv(A @ A.T + 1e-8 * torch.eye(len(A), dtype=A.dtype, device=A.device)) / ctx.scale**2
        return (gradient.to(A.dtype) @ near).to(gradient.dtype), None, None
