"""Neutral names: what a part is, the language of patterns over them (`block[-4:].mlp.up`), and lookups both ways."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

_ANY_NORM = re.compile(r"(\w+_)?norm\d*")
_PICK = r"\s*(?:-?\d+|(?:-?\d+)?:(?:-?\d+)?(?::(?:-?[1-9]\d*)?)?)\s*"
_WORD = re.compile(rf"(?P<base>[\w*?-]+)(?:\[(?P<index>\*|{_PICK}(?:,{_PICK})*)\])?")


@dataclass(frozen=True)
class Part:
    """One part of a network, by name and by place."""

    name: str
    """Neutral name: `block[3].attn.q`, `vision.block[0].mlp.up`, `decoder.block[0].cross.q`, `embed`, `head`."""
    path: str
    """Module path in the model; of the part's output, where `entry` is set."""
    depth: int | None = None
    """Index of the block within its tower; None outside blocks."""
    rows: tuple | None = None
    """Which output features of a packed matrix are this part, however the matrix is stored: None for all,
    `("slice", start, stop)`, or `("heads", groups, group_rows, offset, length)`: with the outputs seen as
    (groups, group_rows), [offset : offset + length] of every group."""
    param: str = "weight"
    """Parameter of that module that holds the matrix."""
    entry: str | None = None
    """For a part that is not one module: path of the module whose input is the part's input."""


class Attention(NamedTuple):
    """A module that hands itself to the function selected by transformers' attention interface."""

    depth: int
    path: str
    n_kv_heads: int
    head_dim: int
    tower: str
    is_cross: bool


@dataclass(frozen=True)
class Anatomy:
    """What `inlay.core.anatomy.anatomy` read from a model. A lone tower's names carry no prefix."""

    architecture: str | None = None
    """`model_type` of the configuration, `timm-vit`, `torch-transformer` or `torch-attention`; None if unknown."""
    parts: dict[str, Part] = field(default_factory=dict)
    """Every part by its name; empty if the architecture is unknown."""
    n_blocks: dict[str, int] = field(default_factory=dict)
    """Number of blocks per tower; the key of a lone tower is the empty string."""
    backbone: str = ""
    """Path of the backbone inside a task model; empty if the model is the backbone."""
    embed: str | None = None
    """Path of the token embedding, or of the module that outputs the token sequence where tokens are no ids."""
    trim: str | None = None
    """Path of the module after which virtual tokens may be cut off again: only pooling and heads follow. Of the tower
    that `embed` feeds; `trims` has all."""
    attention: list[Attention] = field(default_factory=list)
    """Empty where attention is computed without transformers' attention interface."""
    trims: dict[str, str] = field(default_factory=dict)
    """`trim` by tower."""
    aliases: frozenset[str] = frozenset()
    """Prefixes allowed before the names of a lone tower (`vision` for a ViT)."""
    finer: dict[str, Part] = field(default_factory=dict)
    """Places within parts (`mixer.C` are rows of `mixer.x`), which go by their own names only."""

    def match(self, pattern: str) -> list[Part]:
        """The parts that a neutral pattern names, in order; empty if it names none (it may still be a module path).

        A pattern is `[tower.][block[…].]name`. The name is compared with the end of a part's name, so `attn.q` is the
        query projection of every block of every tower, and `norm` every normalisation. `block[8:]` and
        `block[-4:].mlp.up` select blocks as Python slices do, `block[0,2,-1]` lists them, and `block[3]` is the block
        itself. Words may be globs; a last word `*` is everything underneath (`mlp.*`). Of a packed matrix `attn.qkv`
        is the whole, which globs leave out, as they do places within a part.
        """
        query = _Query.read(pattern, {*self.n_blocks, *self.aliases})
        if query is None:
            return []
        found = [part for part in self.parts.values() if query.fits(part, self)]
        apart = () if "*" in pattern else (*self._packed(), *self.finer.values())
        return found or [part for part in apart if query.fits(part, self)]

    def near(self, pattern: str) -> list[str]:
        """Names close to a pattern that matched nothing, at most five, for error messages."""
        anywhere = self.match(re.sub(r"\[[^\]]*\]", "", pattern))
        if anywhere:  # the name is right, the index is not
            return list(dict.fromkeys([anywhere[0].name, anywhere[-1].name]))
        known: dict[str, None] = {}
        for name in self.parts:
            tower, _, rest = _split(name, self.n_blocks)
            short = re.sub(r"\[\d+\]", "", rest) or "block[0]"
            known |= dict.fromkeys([short, *(f"{prefix}.{short}" for prefix in ({tower} - {""} or self.aliases))])
        return difflib.get_close_matches(pattern, known, n=5, cutoff=0.5)

    def name_of(self, path: str, rows: tuple | None = None) -> str | None:
        """The neutral name of the module at `path`, or of some rows of its matrix; None if it has none."""
        found = [part for part in self.parts.values() if (part.path, part.rows) == (path, rows)]
        found += [part for part in self._packed() if (part.path, part.rows) == (path, rows)]
        return min(found, key=lambda part: part.entry is not None).name if found else None

    def _packed(self) -> Iterator[Part]:
        """Packed matrices as wholes: `attn.qkv`, `mlp.gate_up`. Kept out of `parts`, where they would count twice."""
        groups: dict[tuple[str, str], list[Part]] = {}
        for part in self.parts.values():
            if part.rows is not None:
                groups.setdefault((part.path, part.param), []).append(part)
        for parts in groups.values():
            words = [part.name.rpartition(".")[2] for part in parts]
            whole = ("" if max(map(len, words)) == 1 else "_").join(words)
            yield replace(parts[0], name=f"{parts[0].name.rpartition('.')[0]}.{whole}", rows=None)


def _split(name: str, towers: Collection[str]) -> tuple[str, int | None, str]:
    """(tower, block index, rest) of a part's name."""
    tower, dot, rest = name.partition(".")
    tower, rest = (tower, rest) if dot and tower in towers else ("", name)
    block = re.match(r"block\[(\d+)\]\.?", rest)
    return (tower, int(block[1]), rest[block.end() :]) if block else (tower, None, rest)


def _picked(index: str | None, n: int) -> set[int]:
    """Which of n things a selector picks: "3", "-4:", "0,2,-1", "*", or None for all."""
    if index in (None, "*"):
        return set(range(n))
    picked: set[int] = set()
    for piece in str(index).split(","):
        numbers = [int(word) if word.strip() else None for word in piece.split(":")]
        at = numbers[0]
        if len(numbers) > 1:
            picked |= set(range(n)[slice(*numbers)])
        elif at is not None and -n <= at < n:
            picked.add(at % n)
    return picked


@dataclass(frozen=True)
class _Query:
    """A neutral pattern, read."""

    tower: str | None
    on_block: bool
    index: str | None
    """Which blocks, if the pattern speaks of blocks."""
    words: list[tuple[str, str | None]]
    """(glob, selector) of every word after that."""

    @classmethod
    def read(cls, pattern: str, towers: set[str]) -> _Query | None:
        """None if this cannot be a neutral pattern."""
        found = [_WORD.fullmatch(piece) for piece in pattern.split(".")]
        words = [(m["base"], m["index"]) for m in found if m]
        if len(words) < len(found):
            return None
        tower = words.pop(0)[0] if words[0][0] in towers and words[0][1] is None else None
        on_block = bool(words) and words[0][0] == "block"
        index = words.pop(0)[1] if on_block else None
        if not on_block and (not words or (tower is None and words == [("*", None)])):
            return None  # a tower by itself is no part, and a bare star is meant for module paths
        return cls(tower, on_block, index, words)

    def fits(self, part: Part, whole: Anatomy) -> bool:
        tower, depth, rest = _split(part.name, whole.n_blocks)
        if self.tower is not None and self.tower != tower and (tower or self.tower not in whole.aliases):
            return False
        if self.on_block and (depth is None or depth not in _picked(self.index, whole.n_blocks[tower])):
            return False
        have = rest.split(".") if rest else []
        if not have or not self.words:
            return not have and not self.words
        if self.words[-1] != ("*", None):
            return self._agree(have[-len(self.words) :], part, whole)
        span = len(self.words) - 1
        return any(self._agree(have[i : i + span], part, whole) for i in range(len(have) - span))

    def _agree(self, have: list[str], part: Part, whole: Anatomy) -> bool:
        words = self.words[:-1] if self.words[-1] == ("*", None) else self.words
        return len(have) == len(words) and all(
            _agrees(word, base, index, part, whole) for word, (base, index) in zip(have, words, strict=True)
        )


def _agrees(have: str, base: str, index: str | None, part: Part, whole: Anatomy) -> bool:
    """Whether a word of a name (`q`, `norm1`, `conv[2]`) agrees with a word of a pattern."""
    name, _, number = have.removesuffix("]").partition("[")
    if not (_ANY_NORM.fullmatch(name) if base == "norm" else fnmatch.fnmatchcase(name, base)):
        return False
    if index is None or not number:
        return index is None
    stem = part.name[: part.name.rindex(have)] + name + "["
    return int(number) in _picked(index, sum(other.startswith(stem) for other in whole.parts))
