"""Methods that attend in the base's stead, on whole sequences: what a batch pads or packs is taken apart here.

A batch without padding is one call. Otherwise every sequence is attended to by itself, without its padding and without
the others in its row, so a padded or packed sequence gives what it gives alone and no mask is ever made.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.errors import AdapterError, RouteError
from inlay.core.method import AttentionMethod, PrefixMethod, PromptMethod

if TYPE_CHECKING:
    from inlay.core.container import Call
    from inlay.core.tokens import TokenMount


def attending(mount: TokenMount) -> AttentionMethod | None:
    """The method that attends at this mount now: of several the last one."""
    inlay = mount.inlay
    names = inlay.active if inlay.routes is None else [name for name in dict.fromkeys(inlay.routes) if name is not None]
    found = [m for m in mount.methods(names) if isinstance(m, AttentionMethod) and m.attends()]
    if not found:
        return None
    if inlay.routes is not None:
        raise RouteError(f"{found[-1].label()} attends for whole batches while it is trained: route rows after eval()")
    every = [m for other in inlay.state.tokens.values() for m in other.methods(names)]
    if any(isinstance(m, PromptMethod | PrefixMethod) for m in every):
        raise AdapterError(
            f"{found[-1].label()} attends within groups of tokens, which would not see the virtual tokens before the "
            "first of them: train prompts and prefixes in another run"
        )
    return found[-1]


def attended(method: AttentionMethod, q: Tensor, k: Tensor, v: Tensor, rest: dict[str, Any], call: Call) -> Tensor:
    """The attention's output (batch, n, heads, size) as transformers wants it; zero at padding."""
    causal = partial(
        F.scaled_dot_product_attention, is_causal=True, scale=rest.get("scaling"), dropout_p=rest.get("dropout", 0.0)
    )
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:  # heads are told apart, so those that share keys must have their own
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    apart = sequences(q, rest, call)
    if apart is None:
        return method.attend(causal, q, k, v).transpose(1, 2).contiguous()
    y = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    for row, places in apart:
        part = method.attend(causal, *(t[row, :, places][None] for t in (q, k, v)))
        y = y.index_put((torch.full_like(places, row), places), part[0].transpose(0, 1))
    return y


def sequences(q: Tensor, rest: dict[str, Any], call: Call) -> list[tuple[int, Tensor]] | None:
    """(row, places in it) of every sequence of a batch; None where each row is one and nothing is padding.

    Padding is told by the attention mask; packed sequences by `cu_seq_lens_q`, or by position ids that begin again.
    """
    batch, _, n, _ = q.shape
    every = torch.arange(n, device=q.device)
    bounds = rest.get("cu_seq_lens_q")
    if bounds is not None:
        if batch != 1 or int(bounds[-1]) > n:
            raise AdapterError(f"cu_seq_lens_q ends at {int(bounds[-1])}, for {batch} rows of {n}: pack one row whole")
        return [(0, every[a:b]) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True) if a < b]
    mask, positions = call.mask, call.positions
    if mask is not None and mask.shape != (batch, n):
        raise AdapterError(f"the attention mask marks {tuple(mask.shape)} tokens, the attention sees {(batch, n)}")
    positions = None if positions is None or positions.dim() != 2 else positions.expand(batch, n)
    if (mask is None or bool(mask.all())) and (positions is None or bool((positions.diff() == 1).all())):
        return None
    found = []
    for row in range(batch):
        real = every if mask is None else every[mask[row]]
        starts = [] if positions is None else (positions[row, real].diff() != 1).nonzero()[:, 0].add(1).tolist()
        found += [(row, part) for part in real.tensor_split(starts) if len(part)]
    return found
