"""Vectors among the hidden states of a vision tower: [x_0, P_0, X] enters the first block, P_i may replace them at i.

`Inserted` acts along a tower's track (`inlay.core.tracks`). After the embeddings the sequence grows by the columns of
all acting methods, behind the class token; before each block a method may put new vectors into its columns, or leave
there what the blocks made of them; before pooling and heads the columns are cut off. So `last_hidden_state`, pooled
vectors, logits and every entry of `hidden_states` have the length that they have without; attention maps have no rows
for the inserted vectors, but columns, which say how much they were looked at.

The vectors carry no positions, and attention does not ask where they stand. Rows of one batch may have different
numbers of them: the columns that a row lacks are masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core.calls import first
from inlay.core.errors import RouteError
from inlay.core.method import InsertedMethod
from inlay.core.tokens import TokenMount
from inlay.core.towers import arguments
from inlay.core.virtual import trimmed

if TYPE_CHECKING:
    from inlay.core.container import Call, Inlay
    from inlay.core.tracks import Track

MASK = "attention_mask"


@dataclass(frozen=True)
class Running:
    """What was inserted in the running forward of a tower."""

    x: Tensor
    """The pixels that the tower reads (batch, channels, height, width)."""
    width: int
    """Columns inserted."""
    total: int
    """Columns with them."""
    mask: Any
    """What blocks attend to, where rows have different numbers of vectors and the caller gave no mask."""


class Inserted(TokenMount):
    """A track."""

    def __init__(self, module: nn.Module, inlay: Inlay, track: Track) -> None:
        super().__init__(module, inlay, track.path)
        self.track = track
        self.names = arguments(module)
        self.handles: list[Any] = []
        self.x: Tensor | None = None  # the pixels, between the patches and the end of the embeddings
        self.before: Call | None = None  # what the whole model's forward was called with

    # ------------------------------------------------------------------ attaching
    def refresh(self) -> None:
        self.remove()
        if not self.levels:
            return
        track = self.track
        self.handles = [
            self.module.register_forward_pre_hook(self.enter, with_kwargs=True),
            track.patch.register_forward_pre_hook(self.see, with_kwargs=True),
            track.entry.register_forward_hook(self.insert),
            *(block.register_forward_pre_hook(Step(self, i), with_kwargs=True) for i, block in enumerate(track.blocks)),
        ]
        if track.end is not None:
            self.handles.append(track.end.register_forward_hook(self.cut))
        self.handles.append(self.module.register_forward_hook(self.leave, always_call=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    # ------------------------------------------------------------------ which vectors stand where
    def groups(self, batch: int) -> Iterator[tuple[Tensor | None, list[InsertedMethod]]]:
        """The methods that act now, by the rows they act on; None for all rows."""
        if self.inlay.routes is None:
            yield None, self.inserting(self.inlay.active)
            return
        for name, rows in self.inlay.route_groups(batch, self.path):
            yield rows, self.inserting([name])

    def inserting(self, names: list[str]) -> list[InsertedMethod]:
        return [method for method in self.methods(names) if isinstance(method, InsertedMethod)]

    def layout(self, batch: int, device: torch.device) -> tuple[int, Tensor | None]:
        """How many columns there are, and which of them a row has (batch, columns) where rows differ."""
        found = [(rows, sum(method.tokens for method in methods)) for rows, methods in self.groups(batch)]
        width = max([n for _, n in found], default=0)
        if self.inlay.routes is None:
            return width, None
        visible = torch.zeros(batch, width, dtype=torch.bool, device=device)
        for rows, n in found:
            assert rows is not None
            visible[rows.to(device), :n] = True
        even = sum(len(rows) for rows, n in found if rows is not None and n == width) == batch
        return width, None if even else visible

    def put(self, h: Tensor, i: int, x: Tensor) -> Tensor:
        """The hidden states that enter block i with P_i in them."""
        for rows, methods in self.groups(h.shape[0]):
            start = self.track.at
            for method in methods:
                P = method.inserted(i, x if rows is None else x[rows.to(x.device)])
                if P is not None:
                    h = overwritten(h, rows, start, P)
                start += method.tokens
        return h

    # ------------------------------------------------------------------ the forward
    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A mask over the user's tokens grows to match."""
        self.before = None
        if not self.acts():
            return None
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        mask = kwargs.get(MASK)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        width, visible = self.layout(mask.shape[0], mask.device)
        columns = mask.new_ones(mask.shape[0], width) if visible is None else visible.to(mask.dtype)
        return (), kwargs | {MASK: self.widened(mask, columns)}

    def see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.x = first(args, kwargs) if self.acts() else None

    def insert(self, module: nn.Module, args: tuple, h: Tensor) -> Tensor | None:
        """After the embeddings: room for the vectors, and P_0 in it."""
        x, self.x = self.x, None
        if x is None:
            return None
        batch, n, d = h.shape
        width, visible = self.layout(batch, h.device)
        if not width:
            return None
        real = h.new_ones(batch, n, dtype=torch.bool)
        h = self.put(self.widened(h, h.new_zeros(batch, width, d)), 0, x)
        mask = None if visible is None else self.mask(h, self.widened(real, visible))
        self.before = call = self.inlay.state.call
        # methods that select positions see the vectors as padding: they count the user's tokens
        hidden = self.widened(real, real.new_zeros(batch, width))
        running = call.running | {self.path: Running(x, width, n + width, mask)}
        self.inlay.state.call = replace(call, mask=hidden, running=running)
        return h

    def widened(self, t: Tensor, columns: Tensor) -> Tensor:
        """A tensor (batch, tokens, …) with columns where the vectors stand."""
        return torch.cat([t[:, : self.track.at], columns, t[:, self.track.at :]], 1)

    def mask(self, h: Tensor, seen: Tensor) -> Any:
        """What blocks attend to (in the form that the model's attention wants), from `seen` (batch, columns)."""
        config = getattr(self.module, "config", None)
        if config is None or MASK not in arguments(self.track.blocks[0]):
            raise RouteError(
                f"the blocks of {type(self.module).__name__} take no attention mask: rows can only be routed to "
                "adapters with one number of virtual tokens there"
            )
        from transformers.masking_utils import create_bidirectional_mask

        return create_bidirectional_mask(config=config, inputs_embeds=h, attention_mask=seen)

    @property
    def running(self) -> Running | None:
        """What is known of the forward that runs, or of that whose blocks the backward pass runs again."""
        return self.inlay.state.call.running.get(self.path)

    def cut(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Before pooling: the user's tokens."""
        now = self.running
        return None if now is None else trimmed(output, now.total, now.width, self.track.at)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        now, self.x = self.running, None
        if self.before is not None:
            self.inlay.remember(output)  # blocks that are run again see the call that they have seen
            self.inlay.state.call, self.before = self.before, None
        return None if output is None or now is None else trimmed(output, now.total, now.width, self.track.at)


@dataclass(frozen=True)
class Step:
    """What happens before block i."""

    mount: Inserted
    i: int

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        now = self.mount.running
        if now is None:
            return None
        kwargs = dict(zip(arguments(module), args, strict=False)) | kwargs
        name = next(iter(kwargs))
        if self.i:  # P_0 was put there after the embeddings
            kwargs[name] = self.mount.put(kwargs[name], self.i, now.x)
        if now.mask is not None and kwargs.get(MASK) is None:
            kwargs[MASK] = now.mask
        return (kwargs.pop(name),), kwargs


def overwritten(h: Tensor, rows: Tensor | None, start: int, P: Tensor) -> Tensor:
    """h (batch, columns, d) with P (p, d) or (rows, p, d) in the columns from `start`, of all rows or of some."""
    part = h if rows is None else h[rows.to(h.device)]
    P = P.to(h.device, h.dtype).expand(part.shape[0], -1, -1)
    part = torch.cat([part[:, :start], P, part[:, start + P.shape[1] :]], 1)
    return part if rows is None else h.index_copy(0, rows.to(h.device), part)
