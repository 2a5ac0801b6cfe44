"""From `where` to sites: neutral names, paths, globs, regular expressions, module types, Hugging Face spellings."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from inlay.core.anatomy import Anatomy, Part, anatomy
from inlay.core.base import base_modules
from inlay.core.contexts import ContextMethod, context_sites
from inlay.core.errors import SiteError, near
from inlay.core.hosts import Host, LinearHost, QuantisedHost, StoredHost, StoredTransposedHost, host_of, operation
from inlay.core.images import image_sites
from inlay.core.method import (
    AttentionMethod,
    HiddenMethod,
    InsertedMethod,
    Method,
    ParameterMethod,
    PixelMethod,
    TokenMethod,
    WeightMethod,
)
from inlay.core.quantised import is_quantised
from inlay.core.rows import Rows, rows_of
from inlay.core.sites import Site, Source
from inlay.core.towers import token_sites
from inlay.core.trunks import SideMethod, trunk_sites, trunks

if TYPE_CHECKING:
    from torch import dtype as Dtype

Pattern = str | type[nn.Module]


@dataclass
class Finder:
    """Resolves patterns in one model. `head` paths belong to the task and are never matched by a method."""

    model: nn.Module
    head: tuple[str, ...] = ()
    exclude: tuple[Pattern, ...] = ()
    layers: tuple[int, ...] | None = None
    image_size: int | tuple[int, int] | None = None
    """Of the images, for methods on pixels; None: what the model's configuration says."""
    anatomy: Anatomy = field(init=False)
    modules: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.anatomy = anatomy(self.model)
        self.modules = {path: m for path, m in base_modules(self.model).items() if not self._in_head(path)}
        depths = {p.depth for p in self.anatomy.parts.values()} | {_first_number(path) for path in self.modules}
        for layer in self.layers or ():
            if layer not in depths:
                last = max((d for d in depths if d is not None), default=None)
                raise SiteError(f"no layer {layer}: " + ("none is known" if last is None else f"they are 0 to {last}"))

    def _in_head(self, path: str) -> bool:
        return any(inside(path, head) for head in self.head)

    # ------------------------------------------------------------------ patterns to parts
    def parts(self, pattern: Pattern) -> list[Part]:
        """Every place a pattern names; SiteError with near misses when there is none."""
        found = [p for p in self._parts(pattern) if p.path in self.modules and not self._in_head(p.path)]
        if not found:
            raise SiteError(self._nothing(pattern))
        return found

    def _parts(self, pattern: Pattern) -> Iterator[Part]:
        if isinstance(pattern, type):
            yield from (self._part(path) for path, m in self.modules.items() if isinstance(m, pattern))
            return
        if pattern == "all-linear":
            head = self.anatomy.parts.get("head")  # a language model's output layer is not adapted by "all"
            for path, m in self.modules.items():
                if isinstance(host_of(m, self._parent(path)), LinearHost) and not (head and inside(path, head.path)):
                    yield self._part(path)
            return
        if pattern.startswith("type:"):
            kinds = pattern.removeprefix("type:").split("|")
            yield from (self._part(path) for path, m in self.modules.items() if type(m).__name__ in kinds)
            return
        if pattern.startswith("re:"):
            rule = re.compile(pattern[3:])
            yield from (self._part(p) for p in self.modules if rule.fullmatch(p))
            yield from (part for part in self.anatomy.parts.values() if rule.fullmatch(part.name))
            return
        if pattern == "":
            yield self._part("")
            return
        neutral = self.anatomy.match(pattern)
        if neutral:
            yield from neutral
            return
        for path, module in self.modules.items():
            if (
                path == pattern
                or path.endswith("." + pattern)
                or (_is_glob(pattern) and fnmatch.fnmatch(path, pattern))
            ):
                yield self._part(path)
            for name in module._parameters:  # a tensor by its own name: experts' stacks, MHA's in_proj_weight
                full = f"{path}.{name}" if path else name
                if name != "weight" and (full == pattern or full.endswith("." + pattern)):
                    yield Part(full, path, None, param=name)

    def _part(self, path: str) -> Part:
        name = self.anatomy.name_of(path) or path
        known = self.anatomy.parts.get(name)
        return Part(name, path, known.depth if known else _first_number(path))

    def _parent(self, path: str) -> nn.Module | None:
        return self.model.get_submodule(path.rpartition(".")[0]) if path else None

    def _nothing(self, pattern: Pattern) -> str:
        if isinstance(pattern, type):
            return f"the model has no {pattern.__name__}"
        tips = near(pattern, {p.rpartition(".")[2] for p in self.modules} | {*self.anatomy.parts})
        tips = tips or "".join(f" {t}" for t in self.anatomy.near(pattern)[:3])
        kind = self.anatomy.architecture or "unknown: use module paths, globs or types"
        return f"'{pattern}' matches nothing in {type(self.model).__name__} (architecture {kind}){tips}"

    # ------------------------------------------------------------------ parts to sites
    def sites(self, method: Method, patterns: Iterable[Pattern], dtype: Dtype) -> list[Site]:
        """The sites of a method, in model order, each place once."""
        if isinstance(method, ContextMethod):
            return context_sites(self, method, tuple(patterns), dtype)
        if isinstance(method, InsertedMethod | PixelMethod):
            return image_sites(self, method, tuple(patterns), dtype)
        if isinstance(method, TokenMethod | AttentionMethod):
            return token_sites(self, method, tuple(patterns), dtype)
        if isinstance(method, SideMethod):
            return trunk_sites(self, method, tuple(patterns), dtype)
        if method.architecture not in ("", self.anatomy.architecture):
            raise SiteError(
                f"{method.label()} is for the architecture '{method.architecture}', and this "
                f"{type(self.model).__name__} is none"
            )
        chosen: dict[str, Site] = {}
        excluded = {(p.path, p.param, p.rows) for e in self.exclude for p in self.parts(e)}
        for pattern in patterns:
            for part in self.parts(pattern):
                if (part.path, part.param, part.rows) in excluded or (part.path, "weight", None) in excluded:
                    continue
                if self.layers is not None and part.depth not in self.layers:
                    continue
                for site in self._expand(method, part):
                    site.dtype = dtype
                    if method.acts_at(site):
                        site.hears = self._sources(method, site)
                        chosen.setdefault(site.key, site)
        if not chosen:
            raise SiteError(
                f"{method.label()} finds nothing to act on at {list(patterns)}"
                + (f" in layers {list(self.layers)}" if self.layers is not None else "")
                + (f": it needs a base held in few bits, such as quantize='{method.needs}'" if method.needs else "")
            )
        order = {path: i for i, path in enumerate(self.modules)}
        sites = sorted(chosen.values(), key=lambda s: order[s.path])
        for site in sites:
            site.peers = sites
        return sites

    def _expand(self, method: Method, part: Part) -> Iterator[Site]:
        if isinstance(method, ParameterMethod):
            yield from self._parameters(method, part)
        elif isinstance(method, WeightMethod):
            inner = method.everywhere and part.rows is None and part.param == "weight"
            yield from self._operations(part) if inner else self._matrices(part)
        elif method.answers:
            below = next(iter(trunks(self.model, self.anatomy)), None)  # what makes the features
            yield Site(part.path, self.modules[part.path], part.name, param="", key=part.path, trunk=below)
        elif isinstance(method, HiddenMethod):
            yield self._hidden(part)
        else:
            yield Site(part.path, self.modules[part.path], part.name, part.depth, key=part.path)

    def _sources(self, method: Method, site: Site) -> dict[str, Source]:
        """The places whose outputs a method hears: those of its site's block, or of the model where it is in none."""
        found: dict[str, Source] = {}
        block = re.match(r".*?block\[\d+\]\.", site.name)
        for name in method.hears:
            parts = self.anatomy.match(f"{block[0]}{name}" if block else name)
            if not parts:
                near_it = f"the block of '{site.path}'" if block else f"this {type(self.model).__name__}"
                raise SiteError(f"{method.label()} hears '{name}', and {near_it} has no such place")
            for part in parts:
                source = Source(part.path, self.modules[part.path], rows_of(part.rows))
                found[part.name.removeprefix(block[0]) if block else part.name] = source
        return found

    def _operations(self, part: Part) -> Iterator[Site]:
        """Every linear layer, convolution and normalisation of a place; tables and a head if named."""
        module, head = self.modules[part.path], self.anatomy.parts.get("head")
        if isinstance(module, nn.MultiheadAttention) or host_of(module, self._parent(part.path)) is not None:
            yield from self._matrices(part)
            return
        for path, inner in self.modules.items():
            if not inside(path, part.path) or (head is not None and inside(path, head.path) and path != part.path):
                continue
            here, host = self._part(path), operation(inner, self._parent(path))
            if isinstance(inner, nn.MultiheadAttention):
                yield from self._attention(inner, here)
            elif host is not None:
                yield Site(path, inner, here.name, here.depth, host, key=path)

    def _matrices(self, part: Part) -> Iterator[Site]:
        module, rows = self.modules[part.path], rows_of(part.rows)
        if isinstance(module, nn.MultiheadAttention) and part.param == "weight":
            yield from self._attention(module, part)
            return
        p = module._parameters.get(part.param)
        host = site_host(self.model, part.path, part.param)
        if host is None or (p is None and not isinstance(host, QuantisedHost)):
            raise SiteError(
                f"'{part.path}' ({type(module).__name__}) holds no matrix that inlay can adapt: "
                "linear, Conv1D, convolution, embedding, attention and expert tensors are known"
            )
        stacked = p is not None and p.dim() == 3 and isinstance(host, StoredHost | StoredTransposedHost)
        stack: Iterable[int | None] = range(p.shape[0]) if stacked and p is not None else [None]
        for expert in stack:
            key = site_key(part.path, part.param, part.name if rows else None, expert)
            name = part.name if expert is None else f"{part.name}[{expert}]"
            yield Site(part.path, module, name, part.depth, host, part.param, rows, expert, key=key)

    def _attention(self, module: nn.MultiheadAttention, part: Part) -> Iterator[Site]:
        d = module.embed_dim
        for i, role in enumerate("qkv"):
            name = f"{part.name}.{role}"
            if module.in_proj_weight is None:
                param, rows = f"{role}_proj_weight", None
            else:
                param, rows = "in_proj_weight", Rows(i * d, d)
            key = site_key(part.path, param, role if rows else None)
            yield Site(part.path, module, name, part.depth, StoredHost(), param, rows, key=key)
        out = Part(f"{part.name}.o", f"{part.path}.out_proj", part.depth)
        yield from self._matrices(out)

    def _hidden(self, part: Part) -> Site:
        module = self.modules[part.path]
        parent = self._parent(part.path)
        if isinstance(parent, nn.MultiheadAttention):
            raise SiteError(
                f"'{part.path}' is read by its parent and never called: a hidden method would not act there"
            )
        host = host_of(module, parent)
        width = None
        if host is None or part.rows is not None:
            width = self._width(part)
        return Site(
            part.path, module, part.name, part.depth, host, rows=rows_of(part.rows), entry=part.entry, width=width,
            key=part.path if part.rows is None else site_key(part.path, "weight", part.name),
        )  # fmt: skip

    def _width(self, part: Part) -> int | None:
        """Feature width of a composite module: that of the projection that ends it, else the model's hidden size."""
        if part.rows is not None:
            rows = rows_of(part.rows)
            assert rows is not None
            return rows.count
        block = part.name.split("]")[0] + "]" if "]" in part.name else ""
        for last in ("mlp.down", "attn.o", "mixer.out"):
            inner = self.anatomy.parts.get(f"{block}.{last}")
            if inner is not None and inner.path in self.modules:
                host = host_of(self.modules[inner.path])
                weight = self.modules[inner.path]._parameters["weight"]
                if host is not None and weight is not None:
                    return int(host.to_matrix(weight).shape[0])
        module = self.modules[part.path]
        vector = module._parameters.get("weight")
        if vector is not None and vector.dim() == 1:  # a norm
            return int(vector.shape[0])
        config = getattr(self.model, "config", None)
        return getattr(config, "hidden_size", None)

    def _parameters(self, method: ParameterMethod, part: Part) -> Iterator[Site]:
        seen: dict[int, Site] = {}
        for path, module in self.modules.items():
            if not inside(path, part.path):
                continue
            if is_quantised(module) and method.wants(module, "weight"):
                raise SiteError(
                    f"{method.label()} trains a copy of the weight of '{path}', which is quantised: leave it out with "
                    "exclude=, or adapt it with a method that adds to it, such as LoRA"
                )
            for name, p in module._parameters.items():
                if p is None or not method.wants(module, name) or part.param not in ("weight", name):
                    continue
                if id(p) in seen:
                    seen[id(p)].ties.append((path, module, name))
                    continue
                key, here = f"{path}.{name}" if path else name, self._part(path)
                seen[id(p)] = Site(path, module, here.name, here.depth, param=name, key=key)
                yield seen[id(p)]


def site_host(model: nn.Module, path: str, param: str) -> Host | None:
    """How the tensor `param` of a module acts, None where it is no matrix inlay knows."""
    module = model.get_submodule(path)
    if param == "weight":
        return host_of(module, model.get_submodule(path.rpartition(".")[0]) if path else None)
    p = module._parameters.get(param)
    if p is None or p.dim() < 2:
        return None
    # transformers states how an expert stack is stored; plain stacks are (experts, out, in)
    return StoredTransposedHost() if getattr(module, "is_transposed", False) else StoredHost()


def site_key(path: str, param: str, part: str | None = None, expert: int | None = None) -> str:
    """A site's unique name: its path, then what of the module it is where that is not the whole weight."""
    key = path if param == "weight" else f"{path}.{param}"
    if expert is not None:
        key += f"[{expert}]"
    return key if part is None else f"{key}[{part.rpartition('.')[2]}]"


def inside(path: str, root: str) -> bool:
    """Whether a module path is `root` or below it; everything is below the empty path."""
    return root == "" or path == root or path.startswith(root + ".")


def matches(pattern: str, site: Site) -> bool:
    """Whether an override's pattern names a site."""
    if pattern.startswith("re:"):
        return bool(re.fullmatch(pattern[3:], site.path) or re.fullmatch(pattern[3:], site.name))
    return any(
        full == pattern
        or full.endswith("." + pattern)
        or full.startswith(pattern + ".")
        or fnmatch.fnmatch(full, pattern)
        for full in (site.name, site.path, site.key)
    )


def _is_glob(pattern: str) -> bool:
    return any(c in pattern for c in "*?")


def _first_number(path: str) -> int | None:
    return next((int(c) for c in path.split(".") if c.isdigit()), None)


__all__ = ["Finder", "Pattern", "inside", "matches", "site_key"]
