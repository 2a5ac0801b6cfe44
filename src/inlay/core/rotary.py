"""Rotary positions p/s: a context stretched by s (position interpolation, Chen et al. 2023, arXiv 2306.15595)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core.errors import MergeError
from inlay.core.method import AttentionMethod
from inlay.core.tokens import TokenMount

if TYPE_CHECKING:
    from inlay.core.sites import Site

POSITIONS, FREQUENCIES = "position_ids", "inv_freq"


def rotaries(site: Site) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the rotary embeddings of a tower, those that turn position ids into angles."""
    for path, module in site.module.named_modules():
        if FREQUENCIES in module._buffers:
            yield f"{site.path}.{path}" if site.path else path, module


class Rotary(TokenMount):
    """The rotary embedding of a tower, given p/s for p."""

    handle: Any = None
    set_aside: tuple[dict[str, Any], Tensor] | None = None

    def refresh(self) -> None:
        self.remove()
        if self.levels:
            self.handle = self.module.register_forward_pre_hook(self.enter, with_kwargs=True)

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def stretch(self, names: Sequence[str]) -> float:
        """s of these adapters together."""
        return prod([m.stretch for m in self.methods(names) if isinstance(m, AttentionMethod)])

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        p = kwargs[POSITIONS] if POSITIONS in kwargs else args[1]  # forward(x, position_ids)
        stretched = self.stretched(p, (args[0] if args else kwargs["x"]).shape[0])
        if stretched is None:
            return None
        if POSITIONS in kwargs:
            return args, kwargs | {POSITIONS: stretched}
        return (args[0], stretched, *args[2:]), kwargs

    def stretched(self, p: Tensor, batch: int) -> Tensor | None:
        """p/s, of each row's own s where rows are routed; None where no s acts."""
        if self.inlay.routes is None:
            s = self.stretch(self.inlay.active)
            return None if s == 1.0 else p / s
        rows = torch.ones(batch, 1, device=p.device)
        for name, chosen in self.inlay.route_groups(batch, self.path):
            rows[chosen.to(p.device)] = self.stretch([name])
        return p / rows

    # ------------------------------------------------------------------ merging
    def merge(self, names: Sequence[str]) -> None:
        """Write s into the base's configuration and frequencies; MergeError where its kind of positions has no s."""
        s = self.stretch(names)
        if s == 1.0:
            return
        known: Any = self.module
        rope = known.config.rope_parameters
        if rope.get("rope_type") not in ("default", "linear"):
            raise MergeError(
                f"positions are stretched by {s:g}, which the configuration of a base with rotary positions of type "
                f"'{rope.get('rope_type')}' cannot say: keep the adapter beside it"
            )
        frequencies = self.module._buffers[FREQUENCIES]
        assert frequencies is not None
        self.set_aside = rope, frequencies
        known.config.rope_parameters = rope | {"rope_type": "linear", "factor": s * rope.get("factor", 1.0)}
        self.module._buffers[FREQUENCIES] = frequencies / s

    def unmerge(self) -> None:
        """Undo `merge`."""
        if self.set_aside is not None:
            known: Any = self.module
            known.config.rope_parameters, self.module._buffers[FREQUENCIES] = self.set_aside
            self.set_aside = None
