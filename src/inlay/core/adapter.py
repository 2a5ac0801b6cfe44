"""Attaching methods to a model, and the handle one works with afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inlay.core.companion import Companion
from inlay.core.container import Inlay
from inlay.core.errors import AdapterError, ComposeError, OptionError, RouteError, SiteError
from inlay.core.head import Head
from inlay.core.method import Method, ParameterMethod, Placement, WeightMethod, method_from
from inlay.core.modes import evaluating
from inlay.core.mount import Level, acts_on_output
from inlay.core.properties import hold_statistics, release_statistics
from inlay.core.quantised import numbers
from inlay.core.sharded import is_sharded
from inlay.core.sites import Site
from inlay.core.statistics import Calibrated
from inlay.core.where import Finder, Pattern, inside, matches

if TYPE_CHECKING:
    from inlay.core.merge import Merged

HEAD = "head"
Methods = Method | Placement | str | dict | Sequence[Method | Placement | str | dict]


def adapt(
    model: nn.Module,
    methods: Methods,
    where: Pattern | Sequence[Pattern] | None = None,
    *,
    name: str = "default",
    exclude: Sequence[Pattern] = (),
    layers: Iterable[int] | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    head: Literal["auto"] | Sequence[str] | None = "auto",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Adapter:
    """Attach one or several methods as a named adapter; the model stays the model it was.

    Args:
        model: any `nn.Module`. Its tensors are frozen; nothing in it is copied, renamed or replaced.
        methods: a method, a placement (`LoRA().on("attn.q")`), text (`"lora(r=8)"`), or a list of these, lowest first.
        where: neutral names (`attn.q`, `block[3].mlp.up`), module paths or their endings (`query`), globs, `re:…`,
            module types, `"all-linear"`; each method's own default places when omitted.
        name: the adapter's name; several can be attached and switched.
        exclude: patterns to leave out.  layers: block indices to keep.
        overrides: options that differ at some places, `{"block[0]": {"r": 16}}`.
        head: task-head modules trained and saved beside the methods; "auto" finds the classification or
            regression head of a task model, None trains none.
        dtype: type of trained tensors, float32 by default whatever the base holds.
        seed: seed of the initial values; the global random state is left alone.

    Raises:
        SiteError: a pattern matches nothing, or a method cannot act there.  ComposeError: methods that cannot stand
        together.  AdapterError: the name is taken or not usable.
    """
    model_is(model)
    several: Sequence[Any] = methods if isinstance(methods, list | tuple) else [methods]
    placements = [place(m) for m in several]
    patterns = None if where is None else (where,) if isinstance(where, str | type) else tuple(where)
    finder = Finder(model, exclude=tuple(exclude), layers=None if layers is None else tuple(layers))
    heads = find_head(finder) if head == "auto" else tuple(head or ())
    finder = Finder(model, heads, tuple(exclude), None if layers is None else tuple(layers))
    plans = []
    companions = [p.method for p in placements if isinstance(p.method, Companion)]
    for p in [part for placement in placements for part in parts_of(placement, patterns)]:
        if isinstance(p.method, Companion):
            if p.where:
                raise OptionError(f"{p.method.label()} governs the methods beside it and has no places of its own")
            continue
        if p.method.has_sites:
            plans.append((p, finder.sites(p.method, p.where or patterns or p.method.where or ("",), dtype)))
        elif not heads:
            raise SiteError(
                f"{p.method.label()} trains the task head alone, but no head was found: name it, head=['…']"
            )
    if heads:
        plans.append((Placement(Head()), Finder(model).sites(Head(), [f"re:{re.escape(h)}" for h in heads], dtype)))
    check_name(model._modules.get("inlay"), name)
    with undone_on_error(model, name):
        build(model, container(model), name, plans, overrides or {}, seed, companions)
    return Adapter(model, name, placements, heads, dtype, list(patterns or ()), overrides or {}, seed)


def build(
    model: nn.Module,
    inlay: Inlay,
    name: str,
    plans: Sequence[tuple[Placement, list[Site]]],
    overrides: dict[str, dict[str, Any]],
    seed: int,
    companions: Sequence[Companion],
) -> None:
    """Build every method at its sites, with the options that differ there."""
    used = set()
    pairs: list[tuple[Method, Site]] = []
    for placement, sites in plans:
        for site in sites:
            changes: dict[str, Any] = {}
            for pattern, options in ({**overrides, **placement.overrides}).items():
                if not isinstance(placement.method, Head) and matches(pattern, site):
                    used.add(pattern)
                    changes |= options
            pairs.append((placement.method.replace(**changes) if changes else placement.method, site))
    unused = [pattern for pattern in overrides if pattern not in used]
    if unused:
        raise OptionError(f"overrides match no adapted site: {unused}")
    peers = [site for method, site in pairs if not isinstance(method, Head)]
    pairs += [(c, Site("", model, key=c.name(), peers=peers)) for c in companions]
    build_sites(model, inlay, name, pairs, seed)


def build_sites(model: nn.Module, inlay: Inlay, name: str, pairs: Sequence[tuple[Method, Site]], seed: int) -> None:
    """Build each method at its site and switch the adapter on; call it inside `undone_on_error`."""
    if any(is_sharded(p) for p in model.parameters()):
        raise AdapterError("the model is spread over processes already: attach adapters first, then call fully_shard")
    with torch.random.fork_rng(devices=[]), inlay.only():  # methods read the base as it is, whatever acts on it
        torch.manual_seed(seed)
        inlay.adapters[name] = nn.ModuleDict()
        for spec, site in pairs:
            site.inlay = inlay
            method = placed(spec.at(site), site.parameter_device)
            compose(inlay, name, site, method)
            inlay.put(model, name, site, method)
    placed(inlay.tensors, inlay.device)
    inlay.train(model.training)
    inlay.refresh()
    for n, p in model.named_parameters():
        if not n.startswith("inlay."):
            p.requires_grad_(False)
    activate(inlay, [name])


T = TypeVar("T", bound=nn.Module)


def placed(module: T, device: torch.device) -> T:
    """The module on that device; left alone where it is there already, as tensors without storage must be."""
    tensors = (*module.parameters(), *module.buffers())
    return module if all(t.device == device for t in tensors) else module.to(device)


@contextmanager
def undone_on_error(model: nn.Module, name: str) -> Iterator[None]:
    """Take the adapter `name` off again, and what it made, when the context ends with an error."""
    existing = model._modules.get("inlay")
    active = list(existing.active) if isinstance(existing, Inlay) else []
    try:
        yield
    except BaseException:
        inlay = model._modules.get("inlay")
        if isinstance(inlay, Inlay):
            if name in inlay.adapters:
                inlay.drop(name)
            activate(inlay, active)
            discard(model)
        raise


def discard(model: nn.Module) -> None:
    """Take the container off again when nothing is in it."""
    if not attached(model).adapters:
        detach(model)


def compose(inlay: Inlay, name: str, site: Site, method: Method) -> None:
    """Refuse a method that cannot act on top of what the same adapter already has at this site."""
    mount = inlay.state.mounts.get(site.path)
    stand(mount.levels.get(name, []) if mount else [], site, method)


def stand(levels: Sequence[Level], site: Site, method: Method) -> None:
    """ComposeError where a method cannot stand on these levels of its module."""
    below = [lv for lv in levels if overlapping(lv.site, site)]
    if isinstance(method, ParameterMethod):
        readers = [lv for lv in below if isinstance(lv.method, WeightMethod) and lv.method.reads_weight]
        reader = [lv for lv in readers if tensor_of(lv.site) == tensor_of(site)]
        if reader:
            raise ComposeError(
                f"{method.label()} replaces the tensor that {reader[0].method.label()} reads at '{site.path}'"
            )
        if any(isinstance(lv.method, ParameterMethod) and lv.site.param == site.param for lv in below):
            raise ComposeError(f"two methods train their own copy of '{site.key}': keep one of them")
    if not isinstance(method, WeightMethod):
        return
    if method.reads_weight and below:
        raise ComposeError(
            f"{method.label()} reads W at '{site.path}', so it must come first there, "
            f"but {below[0].method.label()} already acts on it: list {method.label()} first, or compose it as `of=`"
        )
    outer = [lv for lv in below if acts_on_output(lv)] if method.formed() else []
    if outer:
        raise ComposeError(
            f"{method.label()} changes the tensor that '{site.path}' reads and {outer[0].method.label()} acts on its "
            f"output, so {method.label()} must come first there: list it first"
        )


def check_stack(inlay: Inlay, names: Sequence[str]) -> None:
    """ComposeError where adapters cannot act on top of each other, in this order; of several heads the last counts."""
    for mount in inlay.state.mounts.values() if len(names) > 1 else ():
        levels: list[Level] = []
        for name in names:
            own = [level for level in mount.levels.get(name, ()) if not level.head]
            for level in own if levels else ():
                stand(levels, level.site, level.method)
            levels += own


def overlapping(a: Site, b: Site) -> bool:
    """Whether two sites of one module touch the same numbers: one tensor, or a tensor and its bias."""
    if tensor_of(a) != tensor_of(b) and a.param != b.bias_name and b.param != a.bias_name:
        return False
    if a.rows is not None and b.rows is not None and a.param == b.param:
        return a.rows == b.rows
    if a.expert is not None and b.expert is not None and a.param == b.param:
        return a.expert == b.expert
    return True


def tensor_of(site: Site) -> str:
    """Which tensor of its module a site is about; whatever a quantised layer is made of is its weight."""
    return "weight" if site.packed else site.param


def model_is(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise AdapterError(
            "adapt the model before DistributedDataParallel wraps it: only tensors that are there then are kept in step"
        )


def parts_of(placement: Placement, where: Sequence[Pattern] | None) -> tuple[Placement, ...]:
    """A method and those that belong to it at places of their own."""
    beside = placement.method.beside()
    if beside and (placement.where or where):
        kinds = ", ".join(type(p.method).__name__ for p in beside)
        raise SiteError(
            f"{placement.method.label()} brings {kinds} with it, each to its own places: leave `where` out, or give it "
            "options without them and list them yourself, with `.on(…)`"
        )
    return (placement, *beside)


def place(method: Method | Placement | str | dict) -> Placement:
    return method if isinstance(method, Placement) else Placement(method_from(method))


def container(model: nn.Module) -> Inlay:
    """`model.inlay`, made on first use."""
    existing = model._modules.get("inlay")
    if isinstance(existing, Inlay):
        return existing
    if existing is not None or "inlay" in model.__dict__:
        raise AdapterError("the model already has an attribute 'inlay' that is not ours")
    inlay = Inlay(model)
    inlay.state.trained = {n: p.requires_grad for n, p in model.named_parameters()}
    inlay.train(model.training)
    model.add_module("inlay", inlay)
    hold_statistics(model)
    return inlay


def attached(model: nn.Module) -> Inlay:
    """`model.inlay`; AdapterError when nothing is attached."""
    inlay = model._modules.get("inlay")
    if not isinstance(inlay, Inlay):
        raise AdapterError("no adapter is attached to this model: call inlay.adapt or inlay.load first")
    return inlay


def check_name(inlay: nn.Module | None, name: str) -> None:
    """AdapterError where no adapter of that name can be attached now to a model with this `model.inlay`, if any."""
    if not name or "." in name or name in dir(nn.ModuleDict):
        raise AdapterError(f"'{name}' cannot name an adapter: use letters, digits, '-' and '_'")
    if not isinstance(inlay, Inlay):
        return
    if name in inlay.adapters:
        raise AdapterError(f"an adapter '{name}' is attached already: delete it or choose another name")
    if inlay.state.merged_names:
        raise AdapterError(
            f"{list(inlay.state.merged_names)} are merged into the base: unmerge first, or "
            "detach(model, keep_merged=True) to go on from the merged tensors"
        )


def find_head(finder: Finder) -> tuple[str, ...]:
    """Modules of the task head of a classification or regression model; none for bare backbones and language models."""
    kind = type(finder.model).__name__
    if not kind.endswith(("Classification", "QuestionAnswering", "MultipleChoice")):
        return ()
    backbone = finder.anatomy.backbone
    if not backbone:
        return ()
    first = backbone.split(".")[0]
    return tuple(
        path for path, module in finder.model.named_children()
        if path not in (first, "inlay") and any(True for _ in module.parameters())
    )  # fmt: skip


def activate(inlay: Inlay, names: Sequence[str]) -> None:
    """Let exactly these adapters act, in this order; only their tensors ask for gradients."""
    inlay.resume()
    merged = inlay.state.merged_names
    for name in names:
        if inlay.check(name) in merged:
            raise AdapterError(f"'{name}' is merged into the base: it acts already, unmerge it to switch it")
    if len(set(names)) < len(names):
        raise AdapterError(f"an adapter acts once at most, got {list(names)}")
    check_stack(inlay, [*merged, *names])
    inlay.state.active = list(names)
    for name, module in inlay.adapters.items():
        for p in module.parameters():
            p.requires_grad_(name in names and p.is_floating_point())


# ---------------------------------------------------------------------- on the model
def use(model: nn.Module, *names: str) -> None:
    """Switch to these adapters, stacked in the order given; none switches all off. No tensor moves.

    Of several task heads the last one's acts. Raises AdapterError on names that are unknown, repeated or merged, and
    ComposeError where an adapter cannot stand on those before it.
    """
    activate(attached(model), names)


@contextmanager
def unadapted(model: nn.Module) -> Iterator[None]:
    """The plain base, whether or not anything is attached to it, for as long as the context lasts."""
    existing = model._modules.get("inlay")
    with existing.only() if isinstance(existing, Inlay) else nullcontext():
        yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The plain base model, for as long as the context lasts."""
    with attached(model).only():
        yield


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Send each row of the batch to its own adapter (None: the plain base), `route(model, ["a", None, "b"])`.

    Raises:
        AdapterError: an unknown name.  RouteError: a batch whose rows are not as many, a module that mixes rows, or a
        method whose tensors are read outside any forward, so that rows cannot be kept apart.
    """
    inlay = attached(model)
    for name in names:
        if name is not None:
            inlay.check(name)
    if not names:
        raise RouteError("route needs one adapter name (or None) per row of the batch")
    inlay.resume()
    before = inlay.state.routes
    inlay.state.routes = list(names)
    try:
        yield
    finally:
        inlay.state.routes = before


def delete(model: nn.Module, name: str) -> None:
    """Remove one adapter and free its tensors; AdapterError while it is merged."""
    inlay = attached(model)
    if inlay.check(name) in inlay.state.merged_names:
        raise AdapterError(f"'{name}' is merged into the base: unmerge first, or detach(model, keep_merged=True)")
    inlay.drop(name)


def detach(model: nn.Module, keep_merged: bool = False) -> None:
    """Remove every adapter; the model's tree, keys, tensors and gradient flags are as before.

    Args:
        keep_merged: leave what is merged in the base's tensors, which makes an ordinary merged model; otherwise the
            base's own tensors return first.
    """
    inlay = attached(model)
    if inlay.state.merged_names and not keep_merged:
        from inlay.core.merge import unmerge

        unmerge(model)
    trained = inlay.state.trained
    inlay.close()
    del model._modules["inlay"]
    release_statistics(model)
    for n, p in model.named_parameters():
        p.requires_grad_(trained.get(n, True))


def penalty(model: nn.Module) -> Tensor | float:
    """The sum of the active methods' regularisers, to be added to the loss; 0.0 where none has one."""
    terms = [t for method in active_methods(model) if (t := method.penalty()) is not None]
    return torch.stack(terms).sum() if terms else 0.0


def step(
    model: nn.Module,
    progress: float,
    optimizer: Optimizer | None = None,
    loss: Callable[[], Tensor | float] | None = None,
) -> None:
    """Tell the active methods that an optimizer step was taken; `progress` runs from 0 to 1.

    Call it after `optimizer.step()` and before `optimizer.zero_grad()`: methods that measure importance read gradients,
    those that begin anew (ReLoRA) change the optimizer's moments. Methods that compare losses (IST) want `loss`, a
    function that computes that of a batch again: it is called in evaluation mode, without gradients.
    """
    methods = active_methods(model)
    for method in methods:
        method.step(progress, optimizer)
    for method in methods:
        method.probe(None if loss is None else partial(loss_now, model, loss))


@torch.no_grad()
def loss_now(model: nn.Module, loss: Callable[[], Tensor | float]) -> float:
    """A loss in evaluation mode, its mean over processes that train together; leaves all modes as they are."""
    with evaluating(model):
        found = torch.as_tensor(loss(), dtype=torch.float32)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(found)
        found = found / torch.distributed.get_world_size()
    return float(found)


def active_methods(model: nn.Module) -> list[Method]:
    """Built methods of the active adapters, each once, with the methods they are made of."""
    inlay = attached(model)
    levels = [level for name in inlay.active for level in inlay.levels(name)]
    methods = {id(m): m for level in levels for m in level.method.modules() if isinstance(m, Method)}
    return [*methods.values(), *inlay.companions()]


class Adapter:
    """Handle of one attached adapter: print it, save it, merge it, switch it."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        placements: list[Placement],
        head: tuple[str, ...],
        dtype: torch.dtype,
        where: list[Pattern],
        overrides: dict[str, dict[str, Any]],
        seed: int,
    ) -> None:
        self.model, self.name, self.placements, self.head = model, name, placements, head
        self.dtype, self.where, self.overrides, self.seed = dtype, where, overrides, seed

    @property
    def levels(self) -> list[Level]:
        """Each built method with its primary site."""
        unique: dict[int, Level] = {}
        for level in attached(self.model).levels(self.name):
            unique.setdefault(id(level.method), level)
        return list(unique.values())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trained tensors, the head's included."""
        yield from attached(self.model).adapters[self.name].parameters()

    @property
    def adapter_parameters(self) -> int:
        """Trained numbers of the methods, without the head."""
        return sum(p.numel() for lv in self.levels if not isinstance(lv.method, Head) for p in lv.method.parameters())

    @property
    def head_parameters(self) -> int:
        """Trained numbers of the task head."""
        return sum(p.numel() for lv in self.levels if isinstance(lv.method, Head) for p in lv.method.parameters())

    @property
    def base_parameters(self) -> int:
        """Numbers in the base model, head included, adapters not."""
        return numbers(m for path, m in self.model.named_modules() if not inside(path, "inlay"))

    def save(self, folder: str, **about: Any) -> None:
        """Write `adapter.safetensors` and `adapter.json` into a folder, atomically; see `inlay.core.checkpoint`."""
        from inlay.core.checkpoint import save

        save(self, folder, about)

    def merge(self, dequantise: bool = False, requantise: bool = False) -> Merged:
        """Fold this adapter into the base's tensors, see `inlay.core.merge`; `unmerge` restores them bit for bit."""
        from inlay.core.merge import merge

        return merge(self.model, self.name, dequantise=dequantise, requantise=requantise)

    def unmerge(self) -> None:
        """Undo `merge`."""
        from inlay.core.merge import unmerge

        unmerge(self.model)

    def delete(self) -> None:
        """Remove this adapter from the model."""
        delete(self.model, self.name)

    def __repr__(self) -> str:
        methods = " + ".join(p.method.label() for p in self.placements)
        inlay = self.model._modules.get("inlay")
        if not isinstance(inlay, Inlay) or self.name not in inlay.adapters:
            return f"adapter '{self.name}': {methods} (no longer attached)"
        trained, head, base = self.adapter_parameters, self.head_parameters, self.base_parameters
        lines = [
            f"adapter '{self.name}': {methods}",
            f"  {trained:,} trained parameters ({100 * trained / max(base, 1):.3f} % of the base), "
            f"{sum(p.nbytes for p in self.parameters()):,} bytes" + (f", and a head of {head:,}" if head else ""),
        ]
        waiting = [m for lv in self.levels for m in lv.method.modules() if isinstance(m, Calibrated)]
        if not all(m.is_calibrated for m in waiting):
            lines.append("  not calibrated: inlay.calibrate(model, batches) lets it start from data")
        for level in self.levels:
            shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in level.method.named_parameters())
            lines.append(f"  {level.site.name or level.site.key:<28} {type(level.method).__name__:<12} {shapes}")
        return "\n".join(lines)
