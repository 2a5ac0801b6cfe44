"""What acts inside an attention, prefixes and other ways to attend, through transformers' attention interface.

Every attention of transformers hands itself, its queries, keys, values and mask to the function that
`config._attn_implementation` names. `Seam` gives one module a view of its configuration that names inlay's function
instead. That lets a method attend in its own way, or puts the prefix before keys and values and calls the function the
configuration really names. So the cache never holds a prefix, rotary positions are applied already, masks are made as
for the real implementation, and the model's own configuration is not touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.errors import AdapterError, SiteError
from inlay.core.method import PrefixMethod, SideAttentionMethod
from inlay.core.sequences import attended, attending
from inlay.core.tokens import TokenMount

if TYPE_CHECKING:
    from inlay.core.container import Inlay
    from inlay.core.towers import Spot

NAME = "inlay"
"""Name of inlay's function in transformers' attention interface."""
HANDLER, CONFIG = "_inlay_attention", "config"


class Handler(Protocol):
    """What a seam hands an attention's tensors to."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, rest: dict[str, Any]) -> tuple:
        """The attention's output and weights."""


class View:
    """A configuration as its owner has it, but for the name of the attention function."""

    _attn_implementation = NAME

    def __init__(self, base: Any) -> None:
        self.__dict__["base"] = base

    def __getattr__(self, name: str) -> Any:
        if "base" not in self.__dict__:  # half made: a copy of the model is on its way
            raise AttributeError(name)
        return getattr(self.__dict__["base"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.base, name, value)


class Seam:
    """The place in one attention module where its tensors pass from the module to the attention function."""

    def __init__(self, module: nn.Module) -> None:
        forward = inspect.unwrap(type(module).forward)
        code, scope = forward.__code__, forward.__globals__
        eager = [name for name in code.co_names if name.endswith("eager_attention_forward")]
        if CONFIG not in module.__dict__ or "ALL_ATTENTION_FUNCTIONS" not in code.co_names or len(eager) != 1:
            raise SiteError(
                f"{type(module).__name__} computes attention without transformers' attention interface: "
                "no method can act on its queries and keys"
            )
        self.module = module
        self.eager: Callable = scope[eager[0]]
        self.interface = scope["ALL_ATTENTION_FUNCTIONS"]
        self.interface.register(NAME, attend)
        self.set_aside: tuple[Any, Any] | None = None

    def open(self, handler: Handler) -> None:
        """Let the module's tensors pass through a handler."""
        own = self.module.__dict__
        self.set_aside = own[CONFIG], own.get(HANDLER)
        own[CONFIG], own[HANDLER] = View(self.config), handler

    def close(self) -> None:
        """The module as it was."""
        if self.set_aside is None:
            return
        own, (config, handler) = self.module.__dict__, self.set_aside
        own[CONFIG], self.set_aside = config, None
        if handler is None:
            del own[HANDLER]
        else:
            own[HANDLER] = handler

    @property
    def config(self) -> Any:
        config = self.module.__dict__[CONFIG]
        return config.base if isinstance(config, View) else config

    @property
    def implementation(self) -> str:
        """The name that the module's configuration has now."""
        return self.config._attn_implementation or "eager"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, rest: dict[str, Any]) -> tuple:
        """The attention function that the configuration names."""
        function = self.interface.get_interface(self.implementation, self.eager)
        return function(self.module, query, key, value, mask, **rest)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """inlay's attention function: whatever is attached to the module decides."""
    return module.__dict__[HANDLER].attend(query, key, value, attention_mask, kwargs)


class AttentionMount(TokenMount):
    """The prefixes before one attention's keys and values, and the method that attends in the base's stead."""

    def __init__(self, module: nn.Module, inlay: Inlay, path: str) -> None:
        super().__init__(module, inlay, path)
        self.seam = Seam(module)

    def refresh(self) -> None:
        self.remove()
        if self.levels:
            self.seam.open(self)

    def remove(self) -> None:
        self.seam.close()

    # ------------------------------------------------------------------ the prefix of a batch
    def of(self, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """P_k and P_v (heads, p, size) of these adapters together."""
        parts = []
        for name in names:
            for level in self.levels.get(name, ()):
                if isinstance(level.method, PrefixMethod):
                    parts.append(level.method.prefix(level.site.parts.index(self.path)))
        if not parts:
            return None
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys, 1), torch.cat(values, 1)

    def prefix(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """P_k and P_v (batch, heads, p, size), and which columns a row has (batch, p) where rows differ."""
        batch = key.shape[0]
        if self.inlay.routes is None:
            whole = self.of(self.inlay.active)
            if whole is None:
                return None
            K, V = (P.to(key.device, key.dtype)[None].expand(batch, -1, -1, -1) for P in whole)
            return K, V, None
        found = [(pair, rows) for name, rows in self.inlay.route_groups(batch, self.path) if (pair := self.of([name]))]
        if not found:
            return None
        width = max(pair[0].shape[1] for pair, _ in found)
        K, V = (t.new_zeros(batch, t.shape[1], width, t.shape[3]) for t in (key, value))
        visible = torch.zeros(batch, width, dtype=torch.bool, device=key.device)
        for (k, v), rows in found:
            rows, n = rows.to(key.device), k.shape[1]
            K, V = (
                whole.index_copy(0, rows, F.pad(part.to(whole), (0, 0, 0, width - n)).expand(len(rows), -1, -1, -1))
                for whole, part in ((K, k), (V, v))
            )
            visible[rows, :n] = True
        return K, V, visible

    # ------------------------------------------------------------------ attention beside the base's
    def aside(self, query: Tensor, rest: dict[str, Any]) -> Tensor | None:
        """What is added to the attention, (batch, n, heads, size); None for nothing."""
        scale = rest.get("scaling")
        if self.inlay.routes is None:
            found = self.beside(self.inlay.active, query, scale)
            return None if found is None else found.transpose(1, 2)
        whole: Tensor | None = None
        for name, rows in self.inlay.route_groups(query.shape[0], self.path):
            rows = rows.to(query.device)
            part = self.beside([name], query[rows], scale)
            if part is not None:
                whole = part.new_zeros(len(query), *part.shape[1:]) if whole is None else whole
                whole = whole.index_copy(0, rows, part)
        return None if whole is None else whole.transpose(1, 2)

    def beside(self, names: Sequence[str], query: Tensor, scale: float | None) -> Tensor | None:
        """The same of these adapters together, laid out like the queries."""
        found: Tensor | None = None
        for level in [level for name in names for level in self.levels.get(name, ())]:
            if isinstance(level.method, SideAttentionMethod):
                part = level.method.aside(level.site.parts.index(self.path), query, scale)
                found = part if found is None else found + part
        return found

    # ------------------------------------------------------------------ the attention
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, rest: dict[str, Any]) -> tuple:
        output, weights = self.main(query, key, value, mask, rest)
        aside = self.aside(query, rest)
        return output if aside is None else output + aside, weights

    def main(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, rest: dict[str, Any]) -> tuple:
        """Attention to the sequence, and to prefixes before it."""
        method = attending(self)
        # with a cache there are more keys than queries, and a sliding window is local already
        if method is not None and query.shape[2] == key.shape[2] and rest.get("sliding_window") is None:
            return attended(method, query, key, value, rest, self.inlay.call), None
        prefix = self.prefix(key, value)
        if prefix is None:
            return self.seam.forward(query, key, value, mask, rest)
        K, V, visible = prefix
        width = K.shape[2]
        mask = self.mask(mask, visible, width, query, key, rest)
        bias = rest.get("position_bias")
        if bias is not None:  # T5: no position, no bias
            rest = rest | {"position_bias": F.pad(bias, (width, 0))}
        return self.seam.forward(query, torch.cat([K, key], 2), torch.cat([V, value], 2), mask, rest)

    def mask(self, mask: Any, visible: Tensor | None, width: int, query: Tensor, key: Tensor, rest: dict) -> Any:
        """The mask with the prefix in it, as the configured implementation wants it."""
        name, n = self.seam.implementation, query.shape[2]
        if name.startswith("flash_attention"):
            if rest.get("sliding_window") is not None or rest.get("cu_seq_lens_q") is not None:
                raise AdapterError(
                    "flash attention with a sliding window or packed rows would lose the prefix: "
                    "model.set_attn_implementation('sdpa')"
                )
            if mask is None and visible is None:
                return None  # it aligns the causal triangle to the last key
            mask = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool) if mask is None else mask
            column = visible if visible is not None else mask.new_ones(mask.shape[0], width)
            return torch.cat([column.to(mask.dtype), mask], 1)
        if name not in ("eager", "sdpa"):
            raise AdapterError(f"prefixes work with eager, sdpa and flash attention, not with '{name}'")
        if mask is None:
            causal = rest.get("is_causal")
            causal = getattr(self.module, "is_causal", True) if causal is None else causal
            triangle = name == "sdpa" and n > 1 and causal  # sdpa draws it itself where it is given no mask
            if visible is None and not triangle:
                return None
            mask = torch.ones(1, 1, n, key.shape[2], dtype=torch.bool, device=key.device)
            mask = mask.tril() if triangle else mask
            mask = mask if name == "sdpa" else torch.zeros_like(mask, dtype=query.dtype)
        return torch.cat([self.columns(visible, width, mask), mask.expand(self.rows(mask, visible), -1, -1, -1)], 3)

    def rows(self, mask: Tensor, visible: Tensor | None) -> int:
        return mask.shape[0] if visible is None else visible.shape[0]

    def columns(self, visible: Tensor | None, width: int, mask: Tensor) -> Tensor:
        """The mask's columns over the prefix (batch, heads, queries, p)."""
        shape = (self.rows(mask, visible), *mask.shape[1:3], width)
        if visible is None:
            return mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)
        seen = visible[:, None, None, :].expand(shape)
        if mask.dtype == torch.bool:
            return seen
        return mask.new_zeros(shape).masked_fill(~seen, torch.finfo(mask.dtype).min)


# ---------------------------------------------------------------------- the keys and values of real words
class Recorder:
    """Keeps the keys and values that pass a seam."""

    def __init__(self, seam: Seam) -> None:
        self.seam = seam
        self.found: tuple[Tensor, Tensor] | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, rest: dict[str, Any]) -> tuple:
        self.found = key[0], value[0]
        return self.seam.forward(query, key, value, mask, rest)


@contextmanager
def recorded(spots: Sequence[Spot]) -> Iterator[list[Recorder]]:
    """Record what the attentions read while the context lasts."""
    recorders = [Recorder(Seam(spot.module)) for spot in spots]
    with ExitStack() as stack:
        for recorder in recorders:
            recorder.seam.open(recorder)
            stack.callback(recorder.seam.close)
        yield recorders
