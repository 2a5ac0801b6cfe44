"""Where contexts enter a dual encoder: the text tower is given prompts with blanks, and its embeddings fill them.

    X X … X       the prompts of the call, as ids               (C, n)
    [opening][blanks][class][blanks][closing]                   (C or images · C, n′)

The tower's own forward sees ordinary ids of the new length, so where it pools and what it masks is its own matter.
Where contexts depend on the image there is a block of prompts per image; of all pairs that the model compares, an
image keeps those with its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from inlay.core.contexts import Blanks, ContextMethod
from inlay.core.errors import AdapterError, ComposeError, RouteError
from inlay.core.hollow import hollow
from inlay.core.tokens import TokenMount
from inlay.core.towers import Tower, arguments

if TYPE_CHECKING:
    from inlay.core.container import Inlay

PER_TOKEN = {"attention_mask": 1, "token_type_ids": 0}
"""What the model is told of every token, with its value at a vector."""


class Prompted(TokenMount):
    """The contexts of one text tower; it sits at the table of token embeddings."""

    def __init__(self, tower: Tower, inlay: Inlay, path: str) -> None:
        assert tower.table is not None
        super().__init__(tower.table, inlay, path)
        self.tower = tower
        self.names = arguments(tower.module)
        self.handles: list[Any] = []
        self.images: Tensor | None = None
        """Vectors of the running forward's images, for a method that depends on them."""
        self.waiting: list[tuple[dict[str, Any], Blanks]] = []
        """Prompts that the running forward of the tower has not read yet."""

    # ------------------------------------------------------------------ attaching
    def refresh(self) -> None:
        self.remove()
        if not self.levels:
            return
        text, joint = self.tower.module, self.tower.joint
        assert joint is not None
        self.handles = [
            text.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.module.register_forward_hook(self.fill),
            *(block.register_forward_pre_hook(Step(self, i)) for i, block in enumerate(self.tower.blocks) if i),
            text.register_forward_hook(self.leave, always_call=True),
            joint.vision.register_forward_hook(self.see),
            joint.model.register_forward_hook(self.pick, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def contexts(self, names: Sequence[str]) -> list[ContextMethod]:
        """The methods of these adapters here."""
        return [method for method in self.methods(names) if isinstance(method, ContextMethod)]

    def stack(self, names: Sequence[str]) -> None:
        found = self.contexts(names)
        if len(found) > 1:
            raise ComposeError(
                f"{' and '.join(method.label() for method in found)} would stand in for the same words of the class "
                "prompts: one of them at a time"
            )

    def acting(self) -> ContextMethod | None:
        """The method that acts now."""
        if self.inlay.routes is None:
            return next(iter(self.contexts(self.inlay.active)), None)
        if self.contexts([name for name in self.inlay.routes if name is not None]):
            raise RouteError("contexts belong to class prompts, which all rows share: use one adapter at a time")
        return None

    # ------------------------------------------------------------------ the forward
    def see(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Keep the images' vectors for a method that depends on them."""
        method = self.acting() if self.inlay.state.running else None
        if method is not None and method.conditional:
            assert self.tower.joint is not None
            self.images = self.tower.joint.vectors(output)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        method, self.waiting = self.acting(), []
        if method is None:
            return None
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None or kwargs.get("position_ids") is not None:
            raise AdapterError("contexts stand in for words: pass class prompts as input_ids, without position_ids")
        if method.conditional and self.images is None:
            raise AdapterError(f"{method.label()} makes prompts for images: call the model itself, with pixel_values")
        columns = self.columns(method, ids.shape[1], mask)
        verify(method, ids, mask, columns)
        blanks = Blanks.lay(ids, method, columns, method.context(self.images))
        tokens = {name: blanks.show(kwargs[name], at) for name, at in PER_TOKEN.items() if kwargs.get(name) is not None}
        # a blank is an ordinary word, at which no model pools
        kwargs |= tokens | {"input_ids": blanks.show(ids, ids[:, method.opening, None])}
        first, *self.waiting = blanks.split(kwargs, method.at_once() or blanks.vector.shape[0])
        self.tell(first[1])
        return (), first[0]

    def tell(self, blanks: Blanks | None) -> None:
        """Let embeddings and blocks see these blanks."""
        self.inlay.state.call = replace(self.inlay.state.call, blanks=blanks)

    def columns(self, method: ContextMethod, n: int, mask: Tensor | None) -> int:
        """n′: the user's columns and what the context adds; a tower that reads its padding keeps its length."""
        positions = self.tower.positions
        asked = n - len(method.words) + method.tokens
        asked = asked if mask is not None else max(n, asked)
        return asked if positions is None else min(asked, positions.num_embeddings)

    def fill(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        blanks = self.inlay.state.call.blanks
        return None if blanks is None else blanks.fill(output)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        waiting, self.waiting = self.waiting, []
        if self.inlay.state.call.blanks is None:
            return None
        self.inlay.remember(output)  # blocks that are run again see the blanks that they have seen
        parts = [] if output is None else [output, *(self.later(module, *part) for part in waiting)]
        self.tell(None)
        return joined(parts) if len(parts) > 1 else None

    def later(self, module: nn.Module, kwargs: dict[str, Any], blanks: Blanks) -> Any:
        """The tower on some more prompts, whose activations are made again in the backward pass."""

        def forward() -> Any:
            self.tell(blanks)
            return type(module).forward(module, **kwargs)

        return checkpoint(forward, use_reentrant=False) if torch.is_grad_enabled() else forward()

    def pick(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Of all pairs of prompts and images, those of an image with its own prompts."""
        images, self.images = self.images, None
        if output is None or images is None:
            return None
        if not isinstance(output, dict):
            raise AdapterError("prompts that depend on the image need the model's output by name: return_dict=True")
        pairs: Tensor = output["logits_per_text"]  # (images · C, images)
        own = pairs.unflatten(0, (len(images), -1)).diagonal(dim1=0, dim2=2)
        texts = output["text_embeds"].unflatten(0, (len(images), -1))
        return type(output)(**{**output, "logits_per_text": own, "logits_per_image": own.T, "text_embeds": texts})


@dataclass(frozen=True)
class Step:
    """What happens before block i > 0."""

    mount: Prompted
    i: int

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        blanks, method = self.mount.inlay.state.call.blanks, self.mount.acting()
        vectors = None if blanks is None or method is None else method.deeper(self.i)
        return None if blanks is None or vectors is None else (blanks.fill(args[0], vectors[None]), *args[1:])


def verify(method: ContextMethod, ids: Tensor, mask: Tensor | None, columns: int) -> None:
    """AdapterError where class prompts are not those that the method was made for, or have no room for its vectors."""
    if torch.compiler.is_compiling() or hollow(ids):
        return
    k = len(method.words)
    begins = ids[:, method.opening : method.opening + k] == torch.tensor(method.words, device=ids.device)
    if not bool(begins.all()) or (method.ahead < method.tokens and not bool((ids == method.closing[-1]).any(1).all())):
        made = f"'{method.prompt}'" if method.prompt else "another prompt (opening, words, closing)"
        raise AdapterError(f"{method.label()} was made for {made}, and the class prompts of this call are not of it")
    end = columns - method.tokens + k  # where the user's columns are cut; the last must stay what it is without a mask
    lost = ids[:, end - 1 :] != ids[:, -1:] if mask is None else mask[:, end:] != 0
    if bool(lost.any()):
        raise AdapterError(f"{method.tokens} vectors and the longest class name are more than the text tower reads")


def joined(parts: Sequence[Any]) -> Any:
    """Outputs of one module for several batches as that for all rows."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return type(first)(**{name: joined([part[name] for part in parts]) for name in first})
    return type(first)(joined(column) for column in zip(*parts, strict=True)) if first is not None else None
