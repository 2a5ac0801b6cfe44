"""Anatomy: the neutral names of a live model's parts (`block[3].attn.q`, `mlp.up`, `vision.norm`, `head`).

`anatomy(model)` reads the module tree and the configuration and nothing else: no forward pass, no tensor's values, so
models on the meta device work. How each architecture spells a part is data: `inlay.core.anatomy_data`. What can be
asked of the result, the pattern language first of all: `inlay.core.anatomy_names`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from inlay.core.anatomy_data import (
    FAMILIES,
    HEAD_PARTS,
    HEADS,
    ROWS,
    STRUCTURES,
    Heads,
    Names,
    Spelling,
    Structure,
    Tower,
)
from inlay.core.anatomy_names import Anatomy, Attention, Part
from inlay.core.base import base_modules

__all__ = ["Anatomy", "Attention", "Part", "anatomy", "outwards"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of a model, by neutral name.

    Known are the families of `anatomy_data.FAMILIES`, by the `model_type` of their configuration, as bare backbones, in
    task models, inside other modules, and several at once (a vision-language model's towers become `vision.` and
    `text.`); timm-style vision transformers and modules built from `torch.nn`'s transformer layers or
    `nn.MultiheadAttention`, by structure. Anything else gives an `Anatomy` with no architecture and no parts.
    """
    return _Reader(model).read()


def _outputs(module: nn.Module, param: str) -> int:
    """Rows of a packed matrix."""
    if param:
        return int(getattr(module, param).shape[0])
    size = getattr(module, "out_features", None)
    return int(size if size is not None else module.nf)  # type: ignore[arg-type]  # transformers' Conv1D


# ------------------------------------------------------------------------------------------------ towers
@dataclass
class _Stack:
    """A tower that was found in the model."""

    tower: Tower
    root: str
    blocks: list[str]
    backbone: str
    config: Any = None
    task: str = ""
    """Path of the outermost module with that configuration."""
    label: str = ""
    """Prefix of the names."""
    long_label: str = ""
    """What to take where `label` is not unique."""

    @property
    def heads(self) -> Heads:
        config = getattr(self.config, self.tower.config) if self.tower.config else self.config
        n = getattr(config, self.tower.heads, None)
        if not n:
            return Heads(0, 0, 0)
        shared = self.tower.heads == "num_attention_heads"  # else the key-value entry is the other tower's
        kv = getattr(config, "num_key_value_heads", None) if shared else None
        return Heads(n, kv or n, getattr(config, "head_dim", None) or config.hidden_size // n)


def _join(*pieces: str) -> str:
    return ".".join(piece for piece in pieces if piece)


def _each(spelling: Spelling) -> tuple[str, ...]:
    return (spelling,) if isinstance(spelling, str) else spelling


def _under(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(root + ".")


def outwards(path: str) -> list[str]:
    """A module and the modules around it, the nearest first."""
    words = path.split(".") if path else []
    return [".".join(words[:n]) for n in range(len(words), -1, -1)]


class _Reader:
    def __init__(self, model: nn.Module) -> None:
        self.modules = base_modules(model, remove_duplicate=False)

    def read(self) -> Anatomy:
        architecture, stacks = self.configured()
        if not stacks:
            architecture, stacks = self.structural()
        if not stacks:
            return Anatomy()
        lone = stacks[0].tower if len(stacks) == 1 else None
        unique = len({s.label for s in stacks} - {""}) == len(stacks)
        for stack in stacks:
            stack.label = "" if lone else stack.label if unique else stack.long_label
        parts = {part.name: part for stack in stacks for part in self.parts(stack)}
        head = {part.name: part for part in self.head(stacks)}
        main = max(stacks, key=lambda s: self.feeds(parts.get(_join(s.label, "embed"))))
        embed = parts.get(_join(main.label, "embed"))
        trims = {s.label: _join(s.root, end) for s in stacks for end in self.present(s.tower.trim, s.root)[:1]}
        return Anatomy(
            architecture=architecture,
            parts=parts | head,
            n_blocks={s.label: len(s.blocks) for s in stacks},
            backbone=self.backbone(stacks, head.get("head")),
            embed=embed.path if embed else None,
            trim=trims.get(main.label),
            attention=[site for stack in stacks for site in self.attention(stack, parts)],
            trims=trims,
            aliases=frozenset({lone.kind, lone.name} - {""}) if lone else frozenset(),
            finer={part.name: part for stack in stacks for part in self.finer(stack)},
        )

    # -------------------------------------------------------------------------------------------- finding towers
    def configured(self) -> tuple[str | None, list[_Stack]]:
        """Towers of the outermost modules whose configuration names a known family."""
        stacks: list[_Stack] = []
        for path, module in self.modules.items():
            config = getattr(module, "config", None)
            family = FAMILIES.get(getattr(config, "model_type", None) or "")
            if family is None or any(_under(path, s.task) for s in stacks):
                continue
            found = self.family(path, family)
            for s in found:
                s.config, s.task = config, path
                s.label = s.tower.name if len(found) > 1 else s.tower.kind
                s.long_label = "_".join(filter(None, (path.rpartition(".")[2], s.tower.name)))
            stacks += found
        whole = getattr(getattr(self.modules[""], "config", None), "model_type", None)
        return whole or "+".join(dict.fromkeys(s.config.model_type for s in stacks)), stacks

    def family(self, task: str, family: tuple[Tower, ...]) -> list[_Stack]:
        inside = sorted((p for p in self.modules if _under(p, task)), key=lambda p: len(p.split(".")) if p else 0)
        for backbone in inside:
            found = [self.stack(tower, _join(backbone, tower.at), backbone) for tower in family]
            if any(found):
                return [s for s in found if s]
        bare = [s for tower in family if (s := self.stack(tower, task, task))]  # an encoder or a decoder by itself
        return sorted(bare, key=lambda s: -len(list(self.named(s, s.tower.block, "", s.blocks[0]))))[:1]

    def stack(self, tower: Tower, root: str, backbone: str) -> _Stack | None:
        signature = tower.signature or next(iter(tower.block.values()))
        for container in (_join(root, blocks) for blocks in _each(tower.blocks)):
            if self.present(signature, _join(container, "0")):
                names = self.modules[container]._modules
                return _Stack(tower, root, [_join(container, name) for name in names], backbone)
        return None

    def structural(self) -> tuple[str | None, list[_Stack]]:
        """Towers of blocks that are known by what they hold."""
        found: dict[tuple[str, str], _Stack] = {}
        for structure in STRUCTURES:
            if found and next(iter(found))[0] != structure.architecture:
                break
            for path in filter(lambda p: self.marked(p, structure), self.modules):
                series = re.sub(r"\d+", "", path) if structure.series else ""
                new = _Stack(structure.tower, "", [], "")
                found.setdefault((structure.architecture, series), new).blocks.append(path)
        for s in found.values():
            s.root = s.backbone = self.around(s.blocks)
            s.label = s.root.rpartition(".")[2]
            s.long_label = s.blocks[0].rpartition(".")[0].replace(".", "_")
        return next(iter(found))[0] if found else None, list(found.values())

    def marked(self, path: str, structure: Structure) -> bool:
        return all(
            isinstance(self.modules.get(_join(path, mark)), kind) for mark, kind in structure.marks.items()
        ) and not any(getattr(self.modules[_join(path, at)], name, None) is not None for at, name in structure.bars)

    def around(self, blocks: list[str]) -> str:
        """The innermost module, itself no mere list, that holds all blocks."""
        columns = zip(*(block.split(".")[:-1] for block in blocks), strict=False)
        shared: list[str] = []
        for words in columns:
            if len(set(words)) > 1:
                break
            shared.append(words[0])
        while shared and isinstance(self.modules[".".join(shared)], nn.ModuleList | nn.Sequential):
            shared.pop()
        return ".".join(shared)

    # -------------------------------------------------------------------------------------------- reading parts
    def present(self, spelling: Spelling, base: str) -> list[str]:
        """The alternatives of a spelling whose modules exist; `nn.Identity` marks a part that is switched off."""
        found = []
        for text in _each(spelling):
            body = re.split("[@#]", text)[0]
            places = [self.modules.get(_join(base, path)) for path in body.split(">")]
            if all(module is not None and not isinstance(module, nn.Identity) for module in places):
                found.append(text)
        return found

    def named(self, stack: _Stack, names: Names, prefix: str, base: str, depth: int | None = None) -> Iterator[Part]:
        """The parts of a table that exist under `base`."""
        for short, spelling in names.items():
            for text in self.present(spelling, base):
                body, _, rule = text.partition("#")
                body, _, param = body.partition("@")
                entry, _, path = body.rpartition(">")
                module = self.modules[_join(base, path)]
                if param and getattr(module, param, None) is None:
                    continue
                rows = ROWS[rule](_outputs(module, param), stack.heads, stack.config) if rule else {}
                yield Part(
                    name=_join(prefix, short),
                    path=_join(base, path),
                    depth=depth,
                    rows=rows.get(short.rpartition(".")[2]),
                    param=param or "weight",
                    entry=_join(base, entry) if entry else None,
                )
                break

    def parts(self, s: _Stack) -> Iterator[Part]:
        """All parts of a tower: what comes before the blocks, the blocks, what comes after."""
        once = {part.name: part for part in self.named(s, s.tower.once, s.label, s.root)}
        last = {name for name in once if re.match(r"(norm|pool|neck)\b", name[len(s.label) :].lstrip("."))}
        for name in [n for n in once if n not in last]:
            yield from self.numbered(s, once[name])
        for i, path in enumerate(s.blocks):
            block = Part(_join(s.label, f"block[{i}]"), path, i)
            if s.tower.whole:
                yield from self.numbered(s, block)
            yield from self.named(s, s.tower.block, block.name, path, i)
        for name in [n for n in once if n in last]:
            yield from self.numbered(s, once[name])
        beside = (list(self.named(s, s.tower.beside, s.label, around)) for around in outwards(s.backbone))
        yield from next(filter(None, beside), [])

    def finer(self, s: _Stack) -> Iterator[Part]:
        """Places within the parts of the blocks."""
        for i, path in enumerate(s.blocks):
            yield from self.named(s, s.tower.finer, _join(s.label, f"block[{i}]"), path, i)

    def numbered(self, s: _Stack, part: Part) -> Iterator[Part]:
        """A part and, where the table asks for it, every convolution and norm inside."""
        yield part
        if re.sub(r"\[\d+\]", "", part.name[len(s.label) :]).lstrip(".") in s.tower.gather:
            count: Counter[str] = Counter()
            for path, module in self.modules.items():
                kind = "conv" if isinstance(module, _CONVS) else "norm" if isinstance(module, _NORMS) else ""
                if kind and _under(path, part.path):
                    yield Part(f"{part.name}.{kind}[{count[kind]}]", path, part.depth)
                    count[kind] += 1

    def head(self, stacks: list[_Stack]) -> Iterator[Part]:
        """The task head: beside the backbone, or further out."""
        if stacks[0].config is None:
            return
        for around in outwards(stacks[0].backbone):
            for name in HEADS:
                if self.present(name, around):
                    yield Part("head", _join(around, name))
                    own = {k: tuple(t.format(head=name) for t in _each(v)) for k, v in HEAD_PARTS.items()}
                    yield from self.named(stacks[0], own, "", around)
                    return

    # -------------------------------------------------------------------------------------------- the whole
    def feeds(self, embed: Part | None) -> int:
        """How likely a tower's `embed` is where tokens enter: a table of embeddings first, then anything."""
        return 0 if embed is None else 2 if isinstance(self.modules[embed.path], nn.Embedding) else 1

    def attention(self, s: _Stack, parts: dict[str, Part]) -> Iterator[Attention]:
        for i in range(len(s.blocks)) if s.tower.interface and s.config else ():
            for word in ("attn", "cross"):
                part = parts.get(_join(s.label, f"block[{i}]", word))
                if part:
                    yield Attention(i, part.entry or part.path, s.heads.kv, s.heads.size, s.label, word == "cross")

    def backbone(self, stacks: list[_Stack], head: Part | None) -> str:
        if len({s.backbone for s in stacks}) > 1:
            return ""
        first = stacks[0]
        # CLIPForImageClassification and the like hold one tower directly, without a backbone around it
        bare = len(stacks) == 1 and head is not None and head.path.rpartition(".")[0] == first.backbone
        return _join(first.backbone, first.tower.at) if bare else first.backbone
