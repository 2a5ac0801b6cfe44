"""AdamW that can hold its moments of a matrix in a low-rank subspace, and step while the backward pass still runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from inlay.core.errors import AdapterError
from inlay.core.hollow import hollow
from inlay.core.sharded import is_sharded
from inlay.optim.subspace import as_matrices, back, basis, into, state_numbers


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101), of whole tensors and of projected ones (GaLore).

    Groups are torch's; each may also hold

    * `rank`: project the gradients of its matrices to so many of their singular vectors (Zhao et al. 2024, arXiv
      2403.03507): R = G Pᵀ, AdamW's step N from R, W ← W − lr·scale·N P. None, the default, for the whole matrix.
    * `every`: steps for which a basis P serves; it is the current gradient's, from the first step on. The moments stay
      as they are when it changes, as in the official code.
    * `scale`: factor on steps but not on their decay, 1 by default.
    * `stacked`: tensors of three axes are stacks of matrices rather than convolutions' kernels.
    * `per_layer`: take a tensor's step as soon as the backward pass has its gradient, which is freed at once.

    Without `rank` and `scale` the steps are those of `torch.optim.AdamW(fused=True)`, bit for bit. Decay comes before
    the step, as in torch. `state_dict` holds tensors and plain numbers.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        own = {"rank": None, "every": 200, "scale": 1.0, "stacked": False, "per_layer": False, "fused": True}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} | own)
        self.group_of = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        self.taken: set[int] = set()
        self.dropping = False
        early = hook(weakref.ref(self))
        for group in self.param_groups:
            for p in group["params"] if group["per_layer"] else ():
                p.register_post_accumulate_grad_hook(early)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every tensor that has a gradient; one without is left alone, and so are its moments."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update(group, [p for p in group["params"] if p.grad is not None])
        self.taken.clear()
        return loss

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """The step of some tensors of a group."""
        if group["rank"] is None:
            self.whole(group, params)
            return
        for p in params:
            self.projected(group, p)

    def whole(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """AdamW's own step."""
        states = [self.state[p] or self.begin(p, p, p.device) for p in params]
        exp_avg, exp_avg_sq, steps = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        scale, (beta1, beta2) = group["scale"], group["betas"]
        adamw(
            params, [p.grad for p in params if p.grad is not None], exp_avg, exp_avg_sq, [], steps, beta1=beta1,
            beta2=beta2, lr=group["lr"] * scale, weight_decay=group["weight_decay"] / scale, eps=group["eps"],
            fused=group["fused"], amsgrad=False, maximize=False,
        )  # fmt: skip

    def projected(self, group: dict[str, Any], p: Tensor) -> None:
        """GaLore's."""
        assert p.grad is not None
        if is_sharded(p):
            raise AdapterError("a projected step needs whole matrices: FSDP2 spreads them, use DDP")
        G, state, (beta1, beta2) = as_matrices(p.grad, group["stacked"]), self.state[p], group["betas"]
        fresh = not state
        done = 0 if fresh or hollow(state["step"]) else int(state["step"])  # a plan has no numbers to count with
        if done % group["every"] == 0:
            state["basis"] = basis(G, group["rank"])
        P = state["basis"]
        R = into(G, P)
        if fresh:
            self.begin(p, R, torch.device("cpu"))
        state["step"] += 1
        m, v = state["exp_avg"].lerp_(R, 1 - beta1), state["exp_avg_sq"].mul_(beta2).addcmul_(R, R, value=1 - beta2)
        spread = v.sqrt().div_((1 - beta2 ** (done + 1)) ** 0.5).add_(group["eps"])
        N = (m / spread).div_(1 - beta1 ** (done + 1))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(back(N, P, G).reshape(p.shape), alpha=-group["lr"] * group["scale"])

    def begin(self, p: Tensor, like: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The state of a tensor before its first step."""
        self.state[p] |= {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(like, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(like, memory_format=torch.preserve_format),
        }
        return self.state[p]

    # ------------------------------------------------------------------ steps within the backward pass
    @property
    def per_layer(self) -> bool:
        """Whether some tensors are stepped within the backward pass."""
        return any(group["per_layer"] for group in self.param_groups)

    @torch.no_grad()
    def early(self, p: Tensor) -> None:
        """Step one tensor now that its gradient is there, and free the gradient."""
        if not self.dropping:
            if several_processes():
                raise AdapterError(
                    "per_layer steps with this process's gradient alone, so processes that train together would drift "
                    "apart: leave per_layer off"
                )
            if id(p) in self.taken:
                raise AdapterError(
                    "per_layer steps a tensor as soon as it has a gradient, so gradients cannot be accumulated over "
                    "several batches: call optimizer.step() after every backward(), or leave per_layer off"
                )
            self.update(self.param_groups[self.group_of[id(p)]], [p])
            self.taken.add(id(p))
        p.grad = None

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A backward pass inside frees gradients as in training but steps nothing."""
        self.dropping = True
        try:
            yield
        finally:
            self.dropping = False

    # ------------------------------------------------------------------ memory
    def state_bytes(self) -> int:
        """Bytes of moments and bases once every tensor has been stepped, in closed form."""
        return sum(
            p.element_size()
            * (2 * p.numel() if group["rank"] is None else state_numbers(p.shape, group["stacked"], group["rank"]))
            for group in self.param_groups
            for p in group["params"]
        )


def several_processes() -> bool:
    """Whether other processes take part in this training."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def hook(optimizer: weakref.ref[AdamW]) -> Callable[[Tensor], None]:
    """Called with every tensor whose gradient has just been accumulated; does nothing once the optimizer is gone."""

    def accumulated(p: Tensor) -> None:
        living = optimizer()
        if living is not None:
            living.early(p)

    return accumulated
