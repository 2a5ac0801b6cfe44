"""`model.inlay`: the one submodule that holds every trained tensor, and the state that says which adapters act."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from inlay.core.attention import AttentionMount
from inlay.core.calls import first, replace_first_output, tensors_in
from inlay.core.companion import Companion
from inlay.core.contexts import Blanks, ContextMethod
from inlay.core.dual import is_dual
from inlay.core.errors import AdapterError, RouteError, near
from inlay.core.inserted import Inserted, Running
from inlay.core.levels import Level
from inlay.core.method import AttentionMethod, InsertedMethod, Method, SideAttentionMethod
from inlay.core.mount import Mount
from inlay.core.positions import marked_prompts, real_tokens, spread
from inlay.core.prompted import Prompted
from inlay.core.rotary import Rotary, rotaries
from inlay.core.sites import Site
from inlay.core.still import Still
from inlay.core.tokens import Entry, TokenMount
from inlay.core.tracks import track_of


@dataclass(eq=False)
class Ear:
    """A tensor that passed one module, from then until the method at another module that asks for it is through."""

    state: State
    value: Tensor | None = None
    rows: Tensor | None = None

    def give(self, t: Tensor) -> None:
        self.value, self.rows = t, self.state.rows

    def input(self) -> Tensor:
        """The tensor, for the rows that are being computed now."""
        if self.value is None:
            raise AdapterError("a method asked for what passed a module that has not run before it in this forward")
        rows = self.state.rows
        return self.value if rows is self.rows else self.value[rows]


@dataclass(eq=False)
class Span(Ear):
    """Where a site's input enters, when that is another module than the one it leaves."""

    handle: Any = None

    def record(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.give(first(args, kwargs))


@dataclass
class Call:
    """What the running forward of the whole model was called with, for methods that select positions."""

    mask: Tensor | None = None
    """Attention mask (batch, tokens), true = real token; None when none was given."""
    past: int = 0
    """Tokens already in the key-value cache: 0 while a prompt is read, positive while tokens are generated."""
    prompt: Tensor | None = None
    """Real tokens of each row that are its prompt (batch,); None when all are."""
    positions: Tensor | None = None
    """Position ids (batch or 1, tokens), where the call gave some."""
    blanks: Blanks | None = None
    """Class prompts with blanks, while a text tower reads them."""
    running: dict[str, Running] = field(default_factory=dict)
    """What is inserted into the hidden states of towers that are running, by the path of the mount."""
    directions: Tensor | None = None
    """Which directions of an intervention act on each row (batch, most); None: all."""
    choices: Tensor | None = None
    """Which tokens are answers to which question, see `inlay.core.choices`; taken out of the model's arguments."""
    cache: Any = None
    """The key-value cache that was given, while the forward runs and whole batches are computed."""


@dataclass(frozen=True)
class Acting:
    """What acts in one forward: adapters, routes, the call, and the rows being computed."""

    active: list[str]
    routes: list[str | None] | None
    call: Call
    rows: Tensor | None


@dataclass(frozen=True)
class Made:
    """How the base that an adapter stands on was quantised for it (LoftQ), and what that needs beside the base."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    """By name, as the adapter's file has them; never cast, as codes hang on their last bits."""


@dataclass
class State:
    """Python-side state of `model.inlay`, kept out of nn.Module's bookkeeping."""

    active: list[str] = field(default_factory=list)
    asking: set[str] = field(default_factory=set)
    """Adapters whose tensors ask for gradients."""
    routes: list[str | None] | None = None
    mounts: dict[str, Mount] = field(default_factory=dict)
    tokens: dict[str, TokenMount] = field(default_factory=dict)
    """What methods on the token sequence attach, by module path."""
    companions: dict[str, list[Companion]] = field(default_factory=dict)
    """What governs the training of an adapter's methods, by the adapter's name."""
    spans: dict[tuple[str, str], Span] = field(default_factory=dict)
    """Where the input of a site enters, by (entry, path)."""
    ears: dict[tuple[str, str], Ear] = field(default_factory=dict)
    """What methods hear of other modules, by (that module's path, path of the method's site)."""
    call: Call = field(default_factory=Call)
    rows: Tensor | None = None
    aside: Acting | None = None
    """What acts outside of a backward pass that has brought back what acted in its forward."""
    prompt: Tensor | None = None
    """Lengths of the prompts inside `inlay.core.positions.prompts`."""
    directions: Tensor | None = None
    """Directions that act inside `inlay.core.positions.directions`, (rows or 1, most)."""
    arguments: list[str] = field(default_factory=list)
    """Names of the model's positional arguments."""
    factored: bool = False
    """Act on outputs even where forming W′ is cheaper: a merge is proved by the path that does not form it."""
    still: Still = field(default_factory=Still)
    """What methods have computed and may use again while nothing trains."""
    running: bool = False
    """Whether the whole model's forward has begun and not ended."""
    handles: list[Any] = field(default_factory=list)
    trained: dict[str, bool] = field(default_factory=dict)
    """`requires_grad` of the base's tensors before anything was attached."""
    merged: dict[tuple[str, str], Any] = field(default_factory=dict)
    """Base tensors set aside by a merge, by (module path, name)."""
    swapped: dict[str, nn.Module] = field(default_factory=dict)
    """Quantised layers set aside by a merge, by path."""
    merged_names: tuple[str, ...] = ()
    """Adapters that are merged now."""
    active_before: list[str] = field(default_factory=list)
    """Adapters that were active before the merge."""
    derived: set[str] = field(default_factory=set)
    """Shared tensors computed from the base's weights."""
    given: set[str] = field(default_factory=set)
    """Shared tensors that came from a file, which a seed may not reproduce."""
    made: dict[str, Made] = field(default_factory=dict)
    """What the base was made of, by the adapter that it was made for."""


class Inlay(nn.Module):
    """Container of all adapters of one model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.tensors = nn.Module()  # frozen tensors shared by sites, as non-persistent buffers
        self.state = State(arguments=list(inspect.signature(model.forward).parameters))
        self.state.handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def forward(self, x: Any) -> Any:
        """x itself: an `nn.Sequential` calls all its children."""
        return x

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as of any module; what was computed before may not hold any more."""
        self.state.still.forget()
        return super().train(mode)

    # ------------------------------------------------------------------ adapters and levels
    @property
    def active(self) -> list[str]:
        """Names of the adapters that act, in stacking order."""
        return self.state.active

    @property
    def routes(self) -> list[str | None] | None:
        """One adapter name per row of the batch inside `inlay.route`, else None."""
        return self.state.routes

    @property
    def spans(self) -> dict[tuple[str, str], Span]:
        return self.state.spans

    @property
    def ears(self) -> dict[tuple[str, str], Ear]:
        return self.state.ears

    @property
    def call(self) -> Call:
        """The running forward's mask and cache length, narrowed to the rows being computed."""
        call, rows = self.state.call, self.state.rows
        if rows is None:
            return call
        mask, prompt, chosen = (t if t is None else t[rows] for t in (call.mask, call.prompt, call.directions))
        return replace(call, mask=mask, prompt=prompt, directions=chosen, choices=None, cache=None)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def names(self) -> list[str]:
        return list(self.adapters)

    def check(self, name: str) -> str:
        """The name if there is such an adapter; AdapterError listing the known ones otherwise."""
        if name not in self.adapters:
            raise AdapterError(
                f"no adapter '{name}'{near(name, self.adapters)} (attached: {', '.join(self.adapters) or 'none'})"
            )
        return name

    def put(self, model: nn.Module, adapter: str, site: Site, method: Method) -> None:
        """Mount a built method and own its parameters."""
        if adapter not in self.adapters:
            self.adapters[adapter] = nn.ModuleDict()
        own = self.adapters[adapter]
        assert isinstance(own, nn.ModuleDict)
        slot = module_key(site.key)
        while slot in own:
            slot += "'"  # a second method of one adapter at the same site
        own[slot] = method
        if isinstance(method, Companion):
            self.state.companions.setdefault(adapter, []).append(method)
            return
        if site.tower is not None:
            for tokens in self.token_mounts(site, method):
                tokens.add(adapter, Level(method, site))
            return
        for path, module in [(site.path, site.module), *((path, module) for path, module, _ in site.ties)]:
            mount = self.mount(model, path, module)
            tied = next((name for p, _, name in site.ties if p == path), None)
            here = site if tied is None else tied_site(site, path, module, tied)
            mount.add(adapter, Level(method, here))
        for entry in site.entrances:
            if (entry, site.path) not in self.spans:
                span = Span(self.state)
                span.handle = model.get_submodule(entry).register_forward_pre_hook(span.record, with_kwargs=True)
                self.spans[entry, site.path] = span
        for source in site.hears.values():
            if (source.path, site.path) not in self.ears:
                self.ears[source.path, site.path] = ear = Ear(self.state)
                self.mount(model, source.path, source.module).ears.append(ear)

    def mount(self, model: nn.Module, path: str, module: nn.Module) -> Mount:
        """The mount of a module, made on first use."""
        if path not in self.state.mounts:
            parent = model.get_submodule(path.rpartition(".")[0]) if path else None
            owner = parent if isinstance(parent, nn.MultiheadAttention) else module
            self.state.mounts[path] = Mount(module, self, path, owner)
        return self.state.mounts[path]

    def token_mounts(self, site: Site, method: Method) -> list[TokenMount]:
        """Where a method on the token sequence attaches, made on first use: a tower's entry and attentions.

        In the entry's stead one that changes the attention itself has the tower's rotary embeddings, one that inserts
        vectors among hidden states the tower's track, one that fills class prompts the table of token embeddings, and
        one that attends beside the base the attentions alone.
        """
        assert site.tower is not None
        tokens = self.state.tokens
        found: list[TokenMount] = []
        if isinstance(method, ContextMethod):
            path = f"{site.key}.embed"
            found = [tokens.get(path) or Prompted(site.tower, self, path)]
            joint = site.tower.joint
            if isinstance(method, InsertedMethod) and joint is not None and joint.track is not None:
                found.append(tokens.get(joint.track.path) or Inserted(joint.vision, self, joint.track))
        elif isinstance(method, AttentionMethod):
            found = [tokens.get(path) or Rotary(module, self, path) for path, module in rotaries(site)]
        elif isinstance(method, InsertedMethod):
            track = track_of(site)
            found = [tokens.get(track.path) or Inserted(site.module, self, track)]
        elif not isinstance(method, SideAttentionMethod):
            found = [tokens.get(site.path) or Entry(site.module, self, site.path, site.tower)]
        for spot in site.tower.at(site.parts):
            found.append(tokens.get(spot.path) or AttentionMount(spot.module, self, spot.path))
        tokens.update({mount.path: mount for mount in found})
        return found

    @property
    def everything(self) -> list[Mount | TokenMount]:
        """All that is attached to the model's modules."""
        return [*self.state.mounts.values(), *self.state.tokens.values()]

    def refresh(self) -> None:
        """Make hooks and properties match the levels that are there."""
        new = [mount.refresh() for mount in self.state.mounts.values()]
        for tokens in self.state.tokens.values():
            tokens.settle(any(new))  # their hooks come after those of mounts

    def drop(self, adapter: str) -> None:
        """Forget one adapter."""
        for mount in self.everything:
            mount.drop(adapter)
        asked = {(source, path) for path, mount in self.state.mounts.items() for source in mount.needs.heard}
        for source, path in [key for key in self.ears if key not in asked]:
            self.state.mounts[source].ears.remove(self.ears.pop((source, path)))
        self.refresh()
        self.state.mounts = {path: m for path, m in self.state.mounts.items() if m.levels or m.ears}
        self.state.tokens = {path: m for path, m in self.state.tokens.items() if m.levels}
        needed = {(entry, path) for path, mount in self.state.mounts.items() for entry in mount.needs.entries}
        for span in [span for span in self.spans if span not in needed]:
            self.spans.pop(span).handle.remove()
        del self.adapters[adapter]
        self.state.still.forget()
        self.state.made.pop(adapter, None)
        self.state.companions.pop(adapter, None)
        for name in self.unused():
            del self.tensors._buffers[name]
            self.state.given.discard(name)
            self.state.derived.discard(name)
        self.state.active = [name for name in self.active if name != adapter]
        self.state.asking.discard(adapter)

    def unused(self) -> set[str]:
        """Names of the shared tensors that no adapter uses."""
        left = {*self.tensors._buffers}
        for adapter in self.adapters:
            if not left:
                break
            left -= {name for level in self.levels(adapter) for name in level.site.uses}
        return left

    def close(self) -> None:
        """Remove every hook; the model is as it was."""
        for name in list(self.adapters):
            self.drop(name)
        for handle in self.state.handles:
            handle.remove()

    def levels(self, adapter: str) -> list[Level]:
        """Every level of one adapter."""
        return [level for mount in self.everything for level in mount.levels.get(adapter, ())]

    def companions(self) -> list[Companion]:
        """Those of the active adapters."""
        return [companion for name in self.active for companion in self.state.companions.get(name, ())]

    # ------------------------------------------------------------------ shared tensors
    def shared_tensor(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A frozen tensor of that name, made on first use and kept once for the whole model."""
        if name not in self.tensors._buffers:
            self.tensors.register_buffer(name, make(), persistent=False)
        return self.tensors._buffers[name]  # type: ignore[return-value]

    def give(self, name: str, tensor: Tensor) -> None:
        """A shared tensor from a file rather than one drawn on first use; saved in full with adapters that use it."""
        self.shared_tensor(name, lambda: tensor)
        self.state.given.add(name)

    # ------------------------------------------------------------------ what acts
    @contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """These adapters and no routing, for as long as the context lasts."""
        active, routes = self.state.active, self.state.routes
        self.state.active, self.state.routes = list(names), None
        try:
            yield
        finally:
            self.state.active, self.state.routes = active, routes

    @contextmanager
    def narrowed(self, rows: Tensor) -> Iterator[None]:
        """Tell position-selecting methods that only these rows of the batch are being computed."""
        before = self.state.rows
        self.state.rows = rows
        try:
            yield
        finally:
            self.state.rows = before

    def route_groups(self, batch: int, path: str) -> list[tuple[str, Tensor]]:
        """(adapter, row indices) of a routed batch; rows of a multiple batch are consecutive (beams, flat tokens)."""
        routes = self.routes
        assert routes is not None
        if batch % len(routes) != 0:
            raise RouteError(f"{len(routes)} rows are routed, but '{path}' sees a batch of {batch}: it mixes rows")
        rows = rows_by_name.__wrapped__ if torch.compiler.is_compiling() else rows_by_name
        return list(rows(tuple(routes), batch // len(routes), self.device))

    # ------------------------------------------------------------------ forwards run again by the backward pass
    def remember(self, output: Any) -> None:
        """Let what acts now act again while the backward pass works on what led to these tensors.

        Activation checkpointing runs blocks again then, after other forwards, contexts left and adapters switched.
        Compiled graphs run nothing again.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        now = self.acting()
        for t in tensors_in(output):
            if t.requires_grad and not t.is_leaf:  # a leaf would keep its hooks beyond this forward
                t.register_hook(lambda gradient: self.recall(now))

    def acting(self) -> Acting:
        return Acting(self.state.active, self.state.routes, self.state.call, self.state.rows)

    def recall(self, then: Acting) -> None:
        """Bring back what acted, until the running backward pass ends."""
        if self.state.aside is None:
            self.state.aside = self.acting()
            torch.autograd.Variable._execution_engine.queue_callback(self.resume)
        self.let_act(then)

    def resume(self) -> None:
        """Undo `recall`; does nothing where nothing was brought back."""
        if self.state.aside is not None:
            self.let_act(self.state.aside)
            self.state.aside = None
            self.forget()

    def let_act(self, what: Acting) -> None:
        state = self.state
        state.active, state.routes, state.call, state.rows = what.active, what.routes, what.call, what.rows

    # ------------------------------------------------------------------ around the whole model's forward
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.state.running:  # the last forward was interrupted (Ctrl-C): no hook ran after it
            for mount in self.state.mounts.values():
                mount.frames.clear()
            self.forget()
        self.state.running = True
        if not torch.compiler.is_compiling():
            self.state.still.begin(module)
            if torch._C._current_graph_task_id() == -1:
                self.resume()  # the last backward pass ended with an error
            for companion in self.companions() if torch.is_grad_enabled() else ():
                companion.ready()
        given = dict(zip(self.state.arguments, args, strict=False)) | kwargs
        mask, past, prompt = real_tokens(given.get("attention_mask")), given.get("past_key_values"), self.state.prompt
        length = past.get_seq_length() if past is not None else 0
        if prompt is None:
            prompt = marked_prompts(given.get("input_ids"), given.get("labels"), mask)
        else:
            prompt = spread(prompt, len(first(args, kwargs)))
        chosen = self.state.directions
        if chosen is not None:
            x = first(args, kwargs)
            chosen = spread(chosen, len(x), "rows of directions").to(x.device)
        mine = "choices" in kwargs and "choices" not in self.state.arguments
        choices = kwargs["choices"] if mine else None
        self.state.call = Call(
            mask, int(length), prompt, given.get("position_ids"), directions=chosen, choices=choices, cache=past
        )
        if self.routes is not None:
            texts, images = given.get("input_ids"), given.get("pixel_values")
            if is_dual(module) and texts is not None and images is not None and len(texts) != len(images):
                raise RouteError(
                    f"{len(images)} images meet {len(texts)} texts, which belong to all of them: rows of such a batch "
                    "cannot be routed; use one adapter at a time"
                )
            self.route_groups(first(args, kwargs).shape[0], type(module).__name__)
            for mount in self.state.mounts.values():
                mount.router.served = False
        return (args, {name: value for name, value in kwargs.items() if name != "choices"}) if mine else None

    def forget(self) -> None:
        """Let go of what was heard and not asked for: the modules between did not run to their end."""
        for ear in self.ears.values():
            ear.value = None

    def check_asked(self, output: Any) -> None:
        """AdapterError where a method heard what came before it, and was then passed by."""
        unasked = [path for (_, path), ear in self.ears.items() if ear.value is not None]
        self.forget()
        acting = {*self.active} if self.routes is None else {*self.routes}
        for path in unasked:
            if output is not None and any(name in self.state.mounts[path].levels for name in acting):
                raise AdapterError(
                    f"'{path}' was not called in this forward: other code (a fused kernel) read its tensors, past the "
                    "method there. Switch the kernel off; one that is for training alone rests in eval mode"
                )

    def _end(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        self.state.running = False
        self.state.still.end()
        self.state.call.cache = None  # it may be large, and is the caller's
        self.check_asked(output)
        changed = self.with_added(args, kwargs, output)
        self.remember(output if changed is None else changed)
        self.check_served(kwargs, output)
        return changed

    def with_added(self, args: tuple, kwargs: dict, output: Any) -> Any:
        """The model's output with what companions add to a loss that may be trained on; None where they add nothing."""
        companions = self.companions()
        if not companions or output is None or not torch.is_grad_enabled():
            return None
        given = dict(zip(self.state.arguments, args, strict=False)) | kwargs
        if given.get("labels") is None:
            return None
        changed = None
        for companion in companions:
            term = companion.added({**given, "choices": self.state.call.choices}, output)
            if term is not None:
                changed = output = replace_first_output(output, output[0] + term)
        return changed

    def check_served(self, kwargs: dict, output: Any) -> None:
        """RouteError where rows were routed to an adapter past whose tensors the forward went."""
        if self.routes is None or output is None or kwargs.get("encoder_outputs") is not None:
            return  # generating, an encoder has run before this forward
        wanted = {name for name in self.routes if name is not None}
        for mount in self.state.mounts.values():
            if not mount.router.served and wanted & set(mount.levels):
                raise RouteError(
                    f"'{mount.path}' was not called in this forward (its tensors are read by other code): "
                    "rows cannot be routed there; use one adapter at a time"
                )


@lru_cache(maxsize=16)
def rows_by_name(routes: tuple[str | None, ...], repeat: int, device: torch.device) -> tuple[tuple[str, Tensor], ...]:
    """Each adapter that rows are routed to with the indices of its rows, of which a row of the batch has `repeat`."""
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(routes):
        if name is not None:
            rows.setdefault(name, []).extend(range(i * repeat, (i + 1) * repeat))
    return tuple((name, torch.tensor(found, device=device)) for name, found in rows.items())


def module_key(key: str) -> str:
    """A site's key as a child name: nn.Module forbids dots."""
    return key.replace(".", "/")


def tied_site(site: Site, path: str, module: nn.Module, name: str) -> Site:
    """The same site seen from another module that holds the same tensor."""
    return Site(path, module, site.name, site.depth, param=name, dtype=site.dtype, key=site.key, inlay=site.inlay)
