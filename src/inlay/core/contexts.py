"""Methods that learn the words around a class's name: what their prompts are made of, and what a method gives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from inlay.core.errors import AdapterError, OptionError, SiteError
from inlay.core.method import Method, Placement, option
from inlay.core.sites import Site
from inlay.core.towers import towers

if TYPE_CHECKING:
    from inlay.core.where import Finder, Pattern

NAME = "{}"
"""Where the class's name goes in a prompt."""
PROBES = ("cat", "seven blue trucks", "oak")
"""Names without a token in common, to see what prompts have in common."""


@dataclass(frozen=True)
class Template:
    """What the prompts of all classes have in common, as token ids: `[CLS] a photo of a … . [SEP]`."""

    text: str
    opening: int
    """Special tokens at the beginning."""
    words: list[int]
    """The words before the class's name."""
    closing: list[int]
    """What follows the name, to the special token that ends the prompt."""

    @classmethod
    def read(cls, text: str, tokenizer: Any) -> Template:
        """The template of a prompt such as `a photo of a {}.`, by a tokenizer of transformers.

        Raises:
            OptionError: a prompt in which `{}` is not there once.
        """
        if text.count(NAME) != 1:
            raise OptionError(
                f"a class prompt holds {NAME} once, where the class goes ('a photo of a {{}}.'): {text!r}"
            )
        bare, full = ([tokenizer(t.replace(NAME, name))["input_ids"] for name in PROBES] for t in (NAME, text))
        opening, before = shared(bare), shared(full)
        closing = shared([ids[::-1] for ids in full])
        return cls(text, opening, list(full[0][opening:before]), list(full[0][len(full[0]) - closing :]))

    @classmethod
    def guess(cls, text: str) -> Template:
        """As much as can be said without a tokenizer, a token per word: enough to count what will be trained."""
        before, after = text.split(NAME, 1)
        return cls(text, 1, [1] * len(before.split()), [1] * (len(after.split()) + 1))


def shared(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows begin with."""
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


class ContextMethod(Method):
    """[opening][v]_1 … [v]_M[class][closing]: vectors where the class prompts of a dual encoder have words.

    The site is the text tower. Its prompts come as token ids; the words before the class's name leave and M vectors
    stand in for them, so pooling, positions and masks are those that the model gives to a prompt of that length.
    """

    kind: ClassVar[str] = "tokens"
    conditional: ClassVar[bool] = False
    """Whether the vectors depend on the image, so that every image has prompts of its own."""

    tokens: int = option(default=16, doc="vectors M", low=1)
    init: Literal["normal", "words"] = option(
        default="normal", doc="start at noise, or at the prompt's own words, repeated or cut to M"
    )
    scale: float = option(default=0.02, doc="deviation of the normal start", low=0.0)
    prompt: str = option(default="", doc="the class prompt that the ids below were made from; a recipe's own is used")
    words: list[int] = option(default=[], doc="token ids of the words before the class, which leave")
    opening: int = option(default=1, doc="special tokens before them", low=0)
    closing: list[int] = option(default=[], doc="token ids after the class, to the one that ends the prompt")

    def with_prompt(self, prompt: str, tokenizer: Any) -> Self:
        """The same method for class prompts made from this text (a transformers tokenizer reads it)."""
        return self.told(Template.read(prompt, tokenizer))

    def told(self, template: Template) -> Self:
        words = template.words[: self.most_words()]
        return self.replace(prompt=template.text, words=words, opening=template.opening, closing=template.closing)

    def most_words(self) -> int | None:
        """How many words of a prompt leave at most; all by default."""
        return None

    @property
    def ahead(self) -> int:
        """How many of the M vectors stand before the class's name; the others follow it."""
        return self.tokens

    def for_any_class(self) -> bool:
        """Whether the vectors serve classes that come later."""
        return True

    def at_once(self) -> int:
        """How many prompts the text tower reads at once; 0 for all of them."""
        return 0

    # ------------------------------------------------------------------ what a method gives
    @abstractmethod
    def context(self, images: Tensor | None) -> Tensor:
        """The vectors (images or 1, classes or 1, M, d) in the space of the input embeddings.

        `images` are the images' vectors of length 1, (images, e), for a conditional method.
        """

    def deeper(self, i: int) -> Tensor | None:
        """The vectors (M, d) that stand there when block i > 0 is entered; None: what block i − 1 made of them."""
        return None

    def start(self, site: Site) -> Tensor:
        """The first M vectors (M, d): noise, or the prompt's words as the base embeds them."""
        if self.init == "normal":
            return (torch.randn(self.tokens, site.features) * self.scale).to(site.dtype)
        if not self.words:
            raise OptionError(
                f"{type(self).__name__}: init='words' needs a prompt with words before its class: "
                f"{type(self).__name__}(…).with_prompt('a photo of a {{}}.', tokenizer), or a recipe's prompt"
            )
        tower, inlay = site.tower, site.inlay
        assert tower is not None
        assert inlay is not None
        with inlay.only():
            found = tower.embedded((self.words * -(-self.tokens // len(self.words)))[: self.tokens])
        return found.to(site.dtype, copy=True)


def told(placement: Placement, template: Template) -> Placement:
    """A placement whose method, if it stands in for words of class prompts, knows them."""
    method = placement.method
    return replace(placement, method=method.told(template)) if isinstance(method, ContextMethod) else placement


@dataclass(frozen=True)
class Blanks:
    """Prompts (rows, n′) with blanks in them, and what fills these; rows are classes, or classes of every image."""

    source: Tensor
    """Which column of the user's prompts each column shows (C, n′)."""
    vector: Tensor
    """Which vector stands in a column (rows, n′); −1 where none does."""
    vectors: Tensor
    """(rows, M, d)."""

    @classmethod
    def lay(cls, ids: Tensor, method: ContextMethod, columns: int, context: Tensor) -> Blanks:
        """The layout of prompts (C, n) in n′ columns; AdapterError where contexts are for other classes."""
        M, k, ahead, opening = method.tokens, len(method.words), method.ahead, method.opening
        C, n = ids.shape
        if context.shape[1] not in (1, C):
            raise AdapterError(f"contexts of {context.shape[1]} classes were trained, and there are {C} class prompts")
        if ahead == M:  # where a class's name ends does not matter
            name = torch.full((C, 1), n, device=ids.device)
        else:
            end = (ids == method.closing[-1]).int().argmax(1, keepdim=True) + 1
            name = end - len(method.closing) - k - opening
        after = opening + ahead + name  # where the second part of the context begins
        j = torch.arange(columns, device=ids.device).expand(C, -1)
        front, back = (j >= opening) & (j < opening + ahead), (j >= after) & (j < after + M - ahead)
        source = torch.where(j < opening, j, torch.where(j < after, j - ahead + k, j - M + k)).clamp(0, n - 1)
        vector = torch.where(front, j - opening, torch.where(back, j - after + ahead, -1))
        images = context.shape[0]
        return cls(source, vector.repeat(images, 1), context.expand(-1, C, -1, -1).flatten(0, 1))

    def show(self, given: Tensor, blank: Tensor | int) -> Tensor:
        """Ids, masks or types (C, n) in the new layout (rows, n′), `blank` where vectors stand."""
        C = given.shape[0]
        shown = torch.where(self.vector[:C] >= 0, blank, given.gather(1, self.source))
        return shown.repeat(self.vector.shape[0] // C, 1)

    def fill(self, x: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Embeddings or hidden states x (rows, n′, d) with the vectors, or others like them, in their places."""
        V = (self.vectors if vectors is None else vectors).to(x.dtype)
        place = self.vector.clamp_min(0)[..., None].expand(-1, -1, V.shape[-1])
        return torch.where((self.vector >= 0)[..., None], V.expand(x.shape[0], -1, -1).gather(1, place), x)

    def split(self, kwargs: dict[str, Any], rows: int) -> list[tuple[dict[str, Any], Blanks]]:
        """A call with these prompts as several, of so many rows at most."""
        whole = self.vector.shape[0]
        if rows >= whole:
            return [(kwargs, self)]
        parts = []
        for start in range(0, whole, rows):
            own = slice(start, start + rows)
            tensors = {n: t[own] if isinstance(t, Tensor) and t.shape[:1] == (whole,) else t for n, t in kwargs.items()}
            parts.append((tensors, Blanks(self.source, self.vector[own], self.vectors[own])))
        return parts


def context_sites(finder: Finder, method: ContextMethod, patterns: Sequence[Pattern], dtype: torch.dtype) -> list[Site]:
    """The text tower of a dual encoder, the one place that contexts have."""
    known = towers(finder.model, finder.anatomy)
    text = next((tower for tower in known if tower.joint is not None and tower.table is not None), None)
    if text is None or text.table is None:
        raise SiteError(
            f"{method.label()} fills class prompts, and {type(finder.model).__name__} is no image-text model with two "
            "towers (CLIP, SigLIP, VisionTextDualEncoder) that reads some"
        )
    other = [p for p in patterns if p != "" and text.embed not in {part.name for part in finder.parts(p)}]
    if other or finder.layers is not None:
        raise SiteError(f"{method.label()} fills the class prompts at '{text.embed}', its one place: leave `where` out")
    width = text.table.embedding_dim
    site = Site(text.root, text.module, text.embed, key=f"{text.root}.context", width=width, tower=text, dtype=dtype)
    site.peers = [site]
    return [site]
