"""Virtual tokens before a tower's sequence: X' = [P; X].

`Entry` sits at the tower's own forward. Going in, ids become embeddings with P before them, and masks, token types and
positions grow to match; while a cache holds the virtual tokens already, only masks and positions do. Coming out, the
virtual tokens are cut off again, before any pooling, so logits and labels keep the user's length.

How rows are laid out is in `inlay.core.virtual`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core.errors import AdapterError, RouteError
from inlay.core.levels import Level
from inlay.core.method import Method, PrefixMethod, PromptMethod
from inlay.core.sharded import assembled
from inlay.core.towers import Tower, arguments
from inlay.core.virtual import Virtual, arrange, left_padding, trimmed

if TYPE_CHECKING:
    from inlay.core.container import Call, Inlay


class TokenMount(ABC):
    """What methods on the token sequence attach to one module."""

    def __init__(self, module: nn.Module, inlay: Inlay, path: str) -> None:
        self.module, self.inlay, self.path = module, inlay, path
        self.levels: dict[str, list[Level]] = {}
        self.attached = False

    def add(self, adapter: str, level: Level) -> None:
        """Put a level on top of an adapter's; `settle` attaches what it needs."""
        self.levels.setdefault(adapter, []).append(level)

    def drop(self, adapter: str) -> None:
        """Forget an adapter's levels; `settle` removes what no other needs."""
        self.levels.pop(adapter, None)

    def settle(self, anew: bool) -> None:
        """Attach what levels need, whichever they are; what is attached already stays, unless asked to be `anew`."""
        if anew or self.attached != bool(self.levels):
            self.refresh()
            self.attached = bool(self.levels)

    @abstractmethod
    def refresh(self) -> None:
        """Attach exactly what the levels need; what is attached goes first."""

    @abstractmethod
    def remove(self) -> None:
        """Leave the module as it was."""

    def stack(self, names: Sequence[str]) -> None:
        """ComposeError where these adapters cannot act here together; any can unless a mount says otherwise."""
        return

    def methods(self, names: Sequence[str]) -> list[Method]:
        """The methods of these adapters here, in order."""
        return [level.method for name in names for level in self.levels.get(name, ())]

    def acts(self) -> bool:
        """Whether one of them acts on a row of the running forward."""
        names = self.inlay.active if self.inlay.routes is None else self.inlay.routes
        return any(name in self.levels for name in names)


class Entry(TokenMount):
    """A tower's forward."""

    def __init__(self, module: nn.Module, inlay: Inlay, path: str, tower: Tower) -> None:
        super().__init__(module, inlay, path)
        self.tower = tower
        self.names = arguments(module)
        self.heard = arguments(tower.decoder) if tower.decoder is not None else []
        self.handles: list[Any] = []
        self.total = self.cut = 0  # columns of the running forward, and how many of them go
        self.before: Call | None = None  # what the whole model's forward was called with

    # ------------------------------------------------------------------ attaching
    def refresh(self) -> None:
        self.remove()
        if not self.levels:
            return
        # not prepended: the whole model's own hook, which may be on this very module, must see the user's mask first
        self.handles = [
            self.module.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.module.register_forward_hook(self.leave, always_call=True),
        ]
        if self.tower.trim is not None:
            self.handles.append(self.tower.trim.register_forward_hook(self.trim))
        if self.tower.decoder is not None:
            self.handles.append(self.tower.decoder.register_forward_pre_hook(self.listen, with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    # ------------------------------------------------------------------ what stands before each row
    def virtual(self, batch: int, device: torch.device) -> Virtual:
        """The virtual tokens of the running forward."""
        if self.inlay.routes is None:
            P, shift = self.of(self.inlay.active)
            return Virtual(0 if P is None else P.shape[0], None if P is None else P[None], None, shift)
        groups = [(*self.of([name]), rows.to(device)) for name, rows in self.inlay.route_groups(batch, self.path)]
        lengths = [0 if P is None else P.shape[0] for P, _, _ in groups]
        width = max(lengths, default=0)
        length, shifts = (torch.zeros(batch, 1, dtype=torch.long, device=device) for _ in range(2))
        whole: Tensor | None = None
        for (P, moved, rows), n in zip(groups, lengths, strict=True):
            length[rows], shifts[rows] = n, moved
            if P is not None:
                P = P.to(device)
                whole = P.new_zeros(batch, width, P.shape[1]) if whole is None else whole
                padded = torch.cat([P.new_zeros(width - n, P.shape[1]), P])
                whole = whole.index_copy(0, rows, padded.expand(len(rows), -1, -1).to(whole.dtype))
        even = sum(len(rows) for (_, _, rows), n in zip(groups, lengths, strict=True) if n == width) == batch
        shifted = any(moved for _, moved, _ in groups)
        return Virtual(width, whole, None if even or not width else length, shifts if shifted else 0)

    def of(self, names: Sequence[str]) -> tuple[Tensor | None, int]:
        """P (p, d) and the shift of these adapters together."""
        methods = self.methods(names)
        prompts = [method.prompt() for method in methods if isinstance(method, PromptMethod)]
        shift = sum(method.tokens for method in methods if isinstance(method, PrefixMethod) and method.shift)
        return torch.cat(prompts) if prompts else None, shift

    def kept(self, virtual: Virtual) -> bool:
        """Whether the virtual tokens stay in the output; RouteError where they would for some rows only."""
        names = self.inlay.active if self.inlay.routes is None else [r for r in self.inlay.routes if r is not None]
        prompts = [m for m in self.methods(list(dict.fromkeys(names))) if isinstance(m, PromptMethod)]
        keep = {method.keep for method in prompts}
        if self.tower.decoder is None and True in keep and (False in keep or virtual.length is not None):
            raise RouteError("prompts that stay in the output (keep=True) cannot stand beside others or none: use one")
        return True in keep or self.tower.decoder is not None

    # ------------------------------------------------------------------ the forward
    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.total = self.cut = 0
        self.before = None
        if not self.acts():
            return None
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        ids, embeds, mask = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        given = ids if embeds is None else embeds
        state = kwargs.get("cache_params")
        if given is None or (state is not None and state.has_previous_state()):
            return None  # nothing to read, or a state-space model whose state has read the virtual tokens
        batch, n = given.shape[:2]
        virtual, past = self.virtual(batch, given.device), cached(kwargs)
        if not virtual.width and isinstance(virtual.shift, int) and virtual.shift == 0:
            return None
        if virtual.width:
            self.check(kwargs, virtual, n, past)
        if mask is None and virtual.length is not None:
            seen = max(0, (past or 0) - virtual.width) + n
            mask = given.new_ones(batch, seen, dtype=torch.long)
        positions = self.positions(kwargs, virtual, mask, past)
        if positions is not None:
            kwargs["position_ids"] = positions
        if not virtual.width:
            return (), kwargs
        if mask is not None:
            kwargs["attention_mask"] = virtual.widen(mask)
        self.change(kwargs, mask, given, max(0, (past or 0) - virtual.width))
        if not past:
            self.prepend(kwargs, virtual, mask)
            self.total, self.cut = virtual.width + n, 0 if self.kept(virtual) else virtual.width
        self.tell(virtual, mask, given, past)
        return (), kwargs

    def embedded(self, kwargs: dict[str, Any]) -> Tensor:
        """The input embeddings of the user's tokens."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            assert self.tower.embedding is not None
            with assembled(self.tower.embedding):  # FSDP2 has not put it together where it wraps a module around it
                embeds = self.tower.embedding(kwargs["input_ids"])
        return embeds

    def change(self, kwargs: dict[str, Any], mask: Tensor | None, given: Tensor, seen: int) -> None:
        """Add to the embeddings what prompts change in them (DePT); `seen` tokens of the user's are in the cache."""
        batch, n = given.shape[:2]
        groups: list[tuple[list[str], Tensor | None]] = [(self.inlay.active, None)]
        if self.inlay.routes is not None:
            routed = self.inlay.route_groups(batch, self.path)
            groups = [([name], rows.to(given.device)) for name, rows in routed]
        changing = [(m, rows) for names, rows in groups for m in self.methods(names) if isinstance(m, PromptMethod)]
        position, X = torch.arange(seen, seen + n, device=given.device)[None], None
        if mask is not None:
            position = (position - left_padding(mask)).clamp(min=0)
        for method, rows in changing:
            here = position if rows is None or mask is None else position[rows]
            part = method.added(here, seen + n)
            if part is None:
                continue
            X = self.embedded(kwargs) if X is None else X
            part = part.to(X.device, X.dtype)
            X = X + part if rows is None else X.index_add(0, rows, part.expand(len(rows), -1, -1))
        if X is not None:
            kwargs["input_ids"], kwargs["inputs_embeds"] = None, X

    def prepend(self, kwargs: dict[str, Any], virtual: Virtual, mask: Tensor | None) -> None:
        """Embeddings and token types with the virtual tokens before them."""
        embeds = self.embedded(kwargs)
        assert virtual.P is not None
        P = virtual.P.to(embeds.device, embeds.dtype).expand(embeds.shape[0], -1, -1)
        self.inlay.remember(P)
        kwargs["input_ids"], kwargs["inputs_embeds"] = None, arrange(P, embeds, mask)
        types = kwargs.get("token_type_ids")
        if types is not None:
            kwargs["token_type_ids"] = arrange(types.new_zeros(types.shape[0], virtual.width), types, mask)

    def positions(self, kwargs: dict, virtual: Virtual, mask: Tensor | None, past: int | None) -> Tensor | None:
        """The positions of virtual and user's tokens; None to leave them to the model, which counts from the left."""
        ids, embeds, positions = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "position_ids"))
        table = self.tower.positions
        from_ids = table is not None and table.padding_idx is not None and ids is not None  # RoBERTa skips padding
        moved = isinstance(virtual.shift, Tensor) or virtual.shift != 0
        if positions is None and not (from_ids or moved or virtual.length is not None):
            return None
        if "position_ids" not in self.names:
            if table is None and not moved:
                return None  # only relative positions
            raise RouteError(
                f"{type(self.module).__name__} counts positions from the left edge and takes none: "
                "rows can only be routed to prompts of one length there"
            )
        seen = max(0, (past or 0) - virtual.width)
        if positions is None and from_ids:
            assert table is not None
            assert ids is not None
            real = ids.ne(table.padding_idx).long()
            positions = (real.cumsum(1) + seen) * real + table.padding_idx
        elif positions is None:
            given = ids if embeds is None else embeds
            assert given is not None
            start = 0 if table is None or table.padding_idx is None else table.padding_idx + 1
            positions = torch.arange(seen, seen + given.shape[1], device=given.device)[None] + start
        if positions.dim() != 2:
            raise AdapterError(f"virtual tokens need position ids (batch, tokens), got {tuple(positions.shape)}")
        rows = max(positions.shape[0], *(t.shape[0] for t in (mask, virtual.length) if t is not None), 1)
        positions = positions.expand(rows, -1) + virtual.shift
        length = virtual.width if virtual.length is None else virtual.length
        if past or not virtual.width:
            return positions + length
        begin = positions[:, :1] if mask is None else positions.gather(1, left_padding(mask))
        column = torch.arange(virtual.width, device=positions.device) - (virtual.width - length)
        return arrange((begin + column.clamp(min=0)).expand(rows, -1), positions + length, mask)

    def tell(self, virtual: Virtual, mask: Tensor | None, given: Tensor, past: int | None) -> None:
        """Let methods that select positions see virtual tokens as padding: they count the user's tokens."""
        call, n = self.inlay.state.call, max(0, (past or 0) - virtual.width) + given.shape[1]
        real = given.new_ones(given.shape[0], n, dtype=torch.bool) if mask is None else mask.ne(0)
        hidden = arrange(real.new_zeros(real.shape[0], virtual.width), real, real)
        self.before, self.inlay.state.call = call, replace(call, mask=hidden)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.before is not None:
            self.inlay.remember(output)  # blocks that are run again see the call that they have seen
            self.inlay.state.call, self.before = self.before, None
        return None if output is None or not self.cut else trimmed(output, self.total, self.cut)

    def trim(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return trimmed(output, self.total, self.cut) if self.cut else None

    # ------------------------------------------------------------------ the decoder that attends to this tower
    def listen(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        kwargs = dict(zip(self.heard, args, strict=False)) | kwargs
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is None or not self.acts():
            return None
        virtual = self.virtual(states.shape[0], states.device)
        if mask is None and virtual.length is not None:
            mask = states.new_ones(states.shape[0], states.shape[1] - virtual.width, dtype=torch.long)
        if mask is None or not virtual.width or mask.shape[-1] == states.shape[1]:
            return None
        if mask.dim() != 2 or mask.shape[1] + virtual.width != states.shape[1]:
            raise AdapterError(
                f"the encoder gave {states.shape[1]} states for a mask of shape {tuple(mask.shape)} and "
                f"{virtual.width} virtual tokens: run it with the adapter that is active now"
            )
        kwargs["encoder_attention_mask"] = virtual.widen(mask)
        return (), kwargs

    # ------------------------------------------------------------------ what cannot be right
    def check(self, kwargs: dict[str, Any], virtual: Virtual, n: int, past: int | None) -> None:
        """AdapterError where virtual tokens would be misplaced."""
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if cache is not None and cache.is_compileable:
            raise AdapterError("a static cache has no room for virtual tokens: generate with the default dynamic cache")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise AdapterError("virtual tokens need an attention mask (batch, tokens), 1 = token, or none")
        if past is None or cache is None:
            return
        told = past + n if mask is None else mask.shape[1] + virtual.width
        if past and (past < virtual.width or past + n != told):
            raise AdapterError(
                f"the cache holds {past} tokens, but mask and {virtual.width} virtual tokens make {told - n}: "
                "it was filled by another adapter or cut; start generation anew"
            )


def cached(kwargs: dict[str, Any]) -> int | None:
    """Tokens in the cache that a tower was called with; None without one."""
    cache = kwargs.get("past_key_values")
    return None if cache is None else int(cache.get_seq_length())
