"""Groups of an optimizer: every tensor at the rate of the method that owns it, LoRA+ ratios, and what decays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from inlay.core.adapter import Adapter
from inlay.core.errors import OptionError
from inlay.core.head import Head
from inlay.core.method import DeltaMethod, Method
from inlay.optim.adamw import AdamW


def optimizer(
    adapter: Adapter,
    learning_rate: float | None = None,
    *,
    rate_factor: float = 1.0,
    head_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    lora_plus: float | None = None,
) -> AdamW:
    """AdamW over an adapter's tensors as its methods want to be optimised: in any loop, `Trainer` and `inlay train`.

    A tensor has the given rate, else that of the method which owns it (of VeRA for the vectors inside a
    `DoRA(of=VeRA())`); a method's own declarations (`Method.optimised`, GaLore's projection) are entries of its group.
    A group's `peak` is its rate before any schedule, in its `unit`. With `transformers.Trainer`:
    `Trainer(…, optimizers=(inlay.optimizer(adapter), None))`.

    Args:
        learning_rate: for all tensors; each method's own by default.
        rate_factor: on the methods' own rates. They suit encoders with norms after the residual, and short runs;
            networks with norms before it (ViT, DINOv2) or long runs want 0.1 to 0.3.
        head_learning_rate: of the task head; `learning_rate`, else the head's own, by default.
        weight_decay: AdamW's decay of matrices; vectors never decay.
        lora_plus: LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B-like tensors, see `is_fast`, learn at so many times
            the rate; 16 is the paper's.

    Raises:
        OptionError: nothing is trained, or `lora_plus` where no method has an update B A.
    """
    head = head_rate([p.method for p in adapter.placements], learning_rate, head_learning_rate)
    groups: dict[str, dict[str, Any]] = {}
    fast = 0
    for level in adapter.levels:
        for owner, name, p in owned(level.method):
            unit = owner.unit if isinstance(owner, Head) else 1.0
            rate = head if isinstance(owner, Head) else first_given(learning_rate, owner.learning_rate * rate_factor)
            if lora_plus is not None and is_fast(owner, name, p):
                rate, fast = rate * lora_plus, fast + 1
            decay = weight_decay if p.dim() > 1 else 0.0
            entries = {"lr": rate * unit, "peak": rate, "unit": unit, "weight_decay": decay / unit}
            entries |= owner.optimised(name)
            groups.setdefault(repr(entries), {"params": [], **entries})["params"].append(p)
    if not groups:
        raise OptionError("nothing would be trained: the method has no tensors here, and no task head was found")
    if lora_plus is not None and not fast:
        raise OptionError("lora_plus sets the rate of B in an update B A, but no method of the recipe has one")
    return AdamW(groups.values())


def head_rate(methods: Sequence[Method], learning_rate: float | None, head_learning_rate: float | None) -> float:
    """Peak rate of the task head beside these methods; where it is all that is trained, the method's own."""
    alone = not any(method.has_sites for method in methods)
    own = methods[0].learning_rate if alone else Head.learning_rate
    return first_given(head_learning_rate, learning_rate, own)


def owned(method: Method) -> Iterator[tuple[Method, str, nn.Parameter]]:
    """(innermost method, name in it, tensor) of every trained tensor, each once."""
    for path, p in method.named_parameters():
        owner, prefix = method, ""
        parts = path.split(".")
        for i in range(1, len(parts)):
            inner = method.get_submodule(".".join(parts[:i]))
            if isinstance(inner, Method):
                owner, prefix = inner, ".".join(parts[:i]) + "."
        yield owner, path.removeprefix(prefix), p


def is_fast(owner: Method, name: str, p: nn.Parameter) -> bool:
    """LoRA+'s fast group: B, and vectors, of methods with a structured update."""
    return isinstance(owner, DeltaMethod) and (name == "B" or p.dim() == 1)


def first_given(*values: Any) -> Any:
    return next(value for value in values if value is not None)
