"""Voices: models that are heard at every step, each with a key-value cache of its own that follows beams and calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.active import attached
from inlay.core.container import Inlay
from inlay.core.modes import evaluating


@dataclass(frozen=True, eq=False)
class Acting:
    """A model with exactly these adapters of it acting, or as the plain base where none is named.

    Expert and anti-expert can be one model without a second copy: `Acting(model, "tuned")` and `Acting(model)`.
    """

    model: nn.Module
    adapters: tuple[str, ...]
    """Names in stacking order."""

    def __init__(self, model: nn.Module, *adapters: str) -> None:
        inlay = attached(model)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "adapters", tuple(inlay.check(name) for name in adapters))


class Voice:
    """The next token's logits of one model, given the same rows as the base."""

    def __init__(self, speaker: nn.Module | Acting) -> None:
        self.model: nn.Module = speaker.model if isinstance(speaker, Acting) else speaker
        self.adapters = speaker.adapters if isinstance(speaker, Acting) else None
        """None leaves on whatever is on."""
        self.accepts = set(inspect.signature(self.model.forward).parameters)
        self.cache: Any = None
        self.ids = self.mask = torch.empty(0, 0, dtype=torch.long)
        self.weights: list[tuple[int, int]] = []

    def forget(self) -> None:
        """Free the cache."""
        self.cache = None

    # ------------------------------------------------------------------ the cache
    def held(self, ids: Tensor, mask: Tensor) -> int:
        """How many columns of these rows the cache holds once its rows are put into their order; 0 begins anew.

        Rows are found by what they read, so it does not matter whether beams were moved, rows dropped or repeated, or
        whether this is a new call: what is not the continuation of a cached row is read from its beginning.
        """
        m = self.ids.shape[1]
        if self.cache is None or not 0 < m < ids.shape[1] or self.weights != versions(self.model):
            return 0
        alike = (ids[:, None, :m] == self.ids).all(-1) & (mask[:, None, :m] == self.mask).all(-1)
        if not alike.any(1).all():
            return 0
        order = alike.int().argmax(1)
        if len(order) != len(self.ids) or bool((order != torch.arange(len(order), device=order.device)).any()):
            self.cache.reorder_cache(order)
        return m

    # ------------------------------------------------------------------ the forward
    @torch.no_grad()
    def next(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (rows, vocabulary) after these rows (rows, tokens); 1 in the mask is a token."""
        past = self.held(ids, mask)
        options = {"use_cache": True, "past_key_values": self.cache if past else None}
        out = self.run(ids, mask, past, options | ({"logits_to_keep": 1} if "logits_to_keep" in self.accepts else {}))
        self.cache = out.get("past_key_values")  # a model without one reads every row anew
        self.ids, self.mask, self.weights = ids.clone(), mask.clone(), versions(self.model)
        return out["logits"][:, -1].float()

    @torch.no_grad()
    def all(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (rows, tokens, vocabulary) at every place, without a cache."""
        return self.run(ids, mask, 0, {"use_cache": False})["logits"].float()

    def run(self, ids: Tensor, mask: Tensor, past: int, options: dict[str, Any]) -> Any:
        device = next(self.model.parameters()).device
        inputs: dict[str, Any] = {"input_ids": ids[:, past:], "attention_mask": mask}
        if "position_ids" in self.accepts:  # as `generate` counts them: padding on the left has no place
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, past:]
        inputs = {name: t.to(device) for name, t in inputs.items()}
        with self.speaking():
            return self.model(**inputs, **{k: v for k, v in options.items() if k in self.accepts}, return_dict=True)

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """The model in evaluation mode with its adapters, for as long as the context lasts."""
        with ExitStack() as stack:
            if self.model.training:
                stack.enter_context(evaluating(self.model))
            if self.adapters is not None:
                stack.enter_context(attached(self.model).only(*self.adapters))
            yield


def versions(model: nn.Module) -> list[tuple[int, int]]:
    """What changes when a model is trained, merged or given other adapters: a cache of before is of no use then."""
    inlay = model._modules.get("inlay")
    active = hash(tuple(inlay.active)) if isinstance(inlay, Inlay) else 0
    tensors = [p for p in model.parameters() if not p.is_inference()]
    return [(active, len(tensors)), *((p.data_ptr(), p._version) for p in tensors)]
