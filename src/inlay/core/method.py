"""The contract of a method: typed fields are its options, a few hooks are its equation.

A method object such as `LoRA(r=8)` is a *specification*: it owns options and no tensors. Attaching makes one *built*
copy of it per site (`Method.at`), and only the built copies hold parameters. Families below are abstract, methods are
final, and the identity hooks of `Method` are the only ones meant to be replaced.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, dataclass_transform

import torch
from torch import Tensor, nn

from inlay.core.errors import ComposeError, OptionError, SiteError, near
from inlay.core.lean import Added, Form
from inlay.core.matrices import Matrix
from inlay.core.options import check_known, option, options

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from inlay.core.sites import Site

    Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

M = TypeVar("M", bound="Method")
T = TypeVar("T")

REGISTRY: dict[str, type[Method]] = {}
"""Every final method by its name: being registered means being documented, offered and tested."""


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(option,))
class Method(nn.Module, ABC):
    """What every method has: options, a site, hooks that default to the identity.

    Class attributes a method states: `kind` (where in the network it acts: weight, hidden, tokens, …), `paper`
    (authors, year, arXiv id) and `where` (the patterns it attaches to when the user names none).
    """

    kind: ClassVar[str]
    paper: ClassVar[str] = ""
    where: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[str] = ""
    """The kind of quantised base without which there is nothing to train, as in `quantize: int4`; empty: any base."""
    architecture: ClassVar[str] = ""
    """The architecture (a configuration's `model_type`) without which there is nothing to act on; empty: any."""
    hears: ClassVar[tuple[str, ...]] = ()
    """Places whose outputs it reads in the running forward with `site.heard`, as they run before its own module: of its
    site's block (`mixer.z`), or by any pattern where the site is in none."""
    learning_rate: ClassVar[float] = 1e-3
    """A rate (AdamW, batch 32, a base of some 10⁷ to 10⁸ parameters) at which defaults learn; the user's rate wins."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(eq=False, repr=False, kw_only=True)(cls)
        cls.acts_before = cls.before is not Method.before
        cls.acts_on_bias = cls.bias_of is not Method.bias_of

    acts_before: ClassVar[bool] = False
    acts_on_bias: ClassVar[bool] = False
    has_sites: ClassVar[bool] = True
    """False for a method that is nothing but the task head beside it."""
    answers: ClassVar[bool] = False
    """Whether it sits at the task head and answers in its stead, so that no head is trained beside it."""
    shares: ClassVar[bool] = False
    """Whether its places train a tensor together."""
    stacks: ClassVar[bool] = True
    """Whether one batched computation can stand for several adapters of it (`torch.vmap` over their tensors)."""
    of_a_run: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of buffers that a training run needs to go on, and a saved adapter does not hold."""
    mergeable: ClassVar[bool] = False
    """Whether the adapted network can be written as the base network with other tensors."""
    unmergeable: ClassVar[str] = "it acts on activations, which no tensor of the base can stand for"
    """Why not, where it cannot."""
    strength = 1.0
    """Share of what it does that a built copy does now; below 1 only while its worth is measured (IST)."""
    resting = False
    """Whether a built copy acts without being trained now (IST)."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # nn.Module needs its dictionaries before the dataclass constructor assigns the first field
        if inspect.isabstract(cls):
            raise TypeError(f"{cls.__name__} is abstract")
        self = super().__new__(cls)
        nn.Module.__init__(self)
        return self

    def __post_init__(self) -> None:
        for name, opt in options(type(self)).items():
            setattr(self, name, opt.check(type(self).__name__, getattr(self, name)))
        self.validate()

    # ------------------------------------------------------------------ hooks
    def validate(self) -> None:
        """Check options against each other; raise OptionError."""
        return

    def beside(self) -> tuple[Placement, ...]:
        """Methods that belong to this one at places of their own, attached and saved with it; none by default."""
        return ()

    def acts_at(self, site: Site) -> bool:
        """Whether the method takes this place, of those that `where` names (AdapterDrop leaves out low blocks)."""
        return True

    @property
    def starts_at_base(self) -> bool:
        """Whether the adapted model equals the base before training, with these options."""
        return True

    @abstractmethod
    def build(self, site: Site) -> None:
        """Create this site's parameters; the random generator is already seeded, tensors are made on the CPU."""

    @abstractmethod
    def count(self, site: Site) -> int:
        """Trainable parameters at this site in closed form."""

    def before(self, x: Tensor) -> Tensor:
        """x ↦ x′, the module's input."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """(x, y) ↦ y′, the module's output given its input."""
        return y

    def bias_of(self, b: Tensor | None) -> Tensor | None:
        """b ↦ b′, the adapted bias (part of the closed form that `weight` begins)."""
        return b

    def penalty(self) -> Tensor | None:
        """A regulariser that belongs to the method, added to the loss; None for none."""
        return None

    def once(self, name: str, make: Callable[[], T]) -> T:
        """make(), computed once while nothing trains (`inlay.core.still`).

        It may depend on the method's own tensors, the shared ones it uses and those of its module, and on nothing else;
        and as it is kept, it must be small: vectors, blocks, never a matrix as large as W.
        """
        inlay = self.site.inlay
        return make() if inlay is None else inlay.state.still.get(self, name, make)

    def step(self, progress: float, optimizer: Optimizer | None) -> None:
        """What happens between optimizer steps; `progress` runs from 0 to 1, the optimizer is for who needs it."""
        return

    def probe(self, loss: Callable[[], float] | None) -> None:
        """Called after every method's `step`; `loss` gives the loss of the batch at hand, if the loop can tell."""
        return

    def optimised(self, name: str) -> dict[str, Any]:
        """How its own trained tensor `name` is optimised: entries of its group, see `inlay.optim.AdamW`."""
        return {}

    def stored(self) -> dict[str, Tensor]:
        """The tensors a saved adapter holds for this site: parameters and states, unless a method folds them."""
        inner = {f"{part}.{name}": t for part, m in self.made_of().items() for name, t in m.stored().items()}
        return self.own_tensors() | inner

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `stored` gave; names and shapes are checked by the caller."""
        for part, method in self.made_of().items():
            method.restore(
                {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
            )
        for name, t in self.own_tensors().items():
            t.detach().copy_(tensors[name])  # which the tensor's version counter sees

    def own_tensors(self) -> dict[str, Tensor]:
        """Parameters and states without those of the methods it is made of."""
        inner = tuple(f"{part}." for part in self.made_of())
        every = dict(self.named_parameters()) | self.states()
        return {name: t for name, t in every.items() if not name.startswith(inner)}

    def tensor(self, name: str) -> Tensor:
        """Its own tensor of that name, or what `torch.func.functional_call` has put in its place."""
        found = getattr(self, name)
        assert isinstance(found, Tensor)
        return found

    def made_of(self) -> dict[str, Method]:
        """The methods among its options, by the option's name."""
        return {name: value for name, value in self.fields().items() if isinstance(value, Method)}

    def states(self) -> dict[str, Tensor]:
        """Persistent buffers: what belongs to the adapter without being trained (running statistics, frozen draws)."""
        return {
            f"{path}.{name}" if path else name: t
            for path, module in self.named_modules()
            for name, t in module._buffers.items()
            if t is not None
            and name not in module._non_persistent_buffers_set
            and not (isinstance(module, Method) and name.startswith(module.of_a_run))
        }

    # ------------------------------------------------------------------ specification and copies
    def at(self, site: Site) -> Self:
        """A built copy of this specification for one site."""
        built = type(self)(**self.fields())
        for name, value in built.fields().items():
            if isinstance(value, Method):
                setattr(built, name, value.at(site))
        built.__dict__["_site"] = site  # past nn.Module, which would register the base module it leads to
        built.build(site)
        site.built[type(self)] = built
        return built

    def afresh(self) -> Self:
        """Another copy built at the same site, as at the start; it is not attached."""
        return self.at(dataclasses.replace(self.site, built={}))

    @property
    def site(self) -> Site:
        """Where this built copy sits; specifications have none."""
        return self.__dict__["_site"]

    def fields(self) -> dict[str, Any]:
        """The options and their values."""
        return {name: getattr(self, name) for name in options(type(self))}

    def replace(self, **changes: Any) -> Self:
        """The same specification with some options changed."""
        check_known(type(self).__name__, changes, options(type(self)))
        return type(self)(**{**self.fields(), **changes})

    def on(self, *where: str | type[nn.Module]) -> Placement:
        """This method at the given places, for adapters that are made of several."""
        return Placement(self, tuple(where))

    def specification(self) -> dict[str, Any]:
        """Name and options as plain data; `method_from` reads it back."""
        plain = {k: v.specification() if isinstance(v, Method) else v for k, v in self.fields().items()}
        return {"method": type(self).name(), **plain}

    @classmethod
    def name(cls) -> str:
        """Registered name: the class name in lower case."""
        return cls.__name__.lower()

    @classmethod
    def equation(cls) -> str:
        """The docstring's first line."""
        return (inspect.getdoc(cls) or "").split("\n", 1)[0]

    def label(self) -> str:
        """A short name with the options that differ from the defaults: `LoRA(r=4)`, `DoRA(of=VeRA)`."""
        shown = []
        for name, opt in options(type(self)).items():
            value = getattr(self, name)
            text = value.label() if isinstance(value, Method) else repr(value)
            default = opt.default.label() if isinstance(opt.default, Method) else repr(opt.default)
            if text != default:
                shown.append(f"{name}={text}")
        return f"{type(self).__name__}({', '.join(shown)})" if shown else type(self).__name__

    def __repr__(self) -> str:
        return self.label()


@dataclasses.dataclass(frozen=True)
class Placement:
    """A method, the places it goes to, and options that differ there: `overrides={"block[0]": {"r": 16}}`."""

    method: Method
    where: tuple[str | type[nn.Module], ...] = ()
    overrides: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


# ---------------------------------------------------------------------- families
class WeightMethod(Method):
    """Acts on a frozen matrix W (d_out, d_in): has the closed form W ↦ `weight(W)`, b ↦ `bias_of(b)`."""

    mergeable: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False
    """Whether building or applying it looks at W: such a method must come first at its site."""
    everywhere: ClassVar[bool] = False
    """Whether a place means every operation inside it: linear layers, convolutions and normalisations too."""

    @abstractmethod
    def weight(self, W: Tensor) -> Tensor:
        """W ↦ W′ in closed form, in the dtype of W."""

    @abstractmethod
    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The same map on outputs, without forming W′."""

    def update(self) -> Matrix | None:
        """ΔW when W′ = W + ΔW, so that the cheapest path can be chosen; None otherwise."""
        return None

    def form(self) -> Form | None:
        """W ↦ W′ as it is now, with gradients of its own making; None where there is no such form."""
        return None

    def exact_now(self) -> bool:
        """Whether `weight` gives what the forward pass gives now (not while dropout is active)."""
        return True

    def triplets(self) -> int:
        """How many singular triplets `begin_at` takes; 0 where no factors could be set to them."""
        return 0

    def begin_at(self, U: Tensor, S: Tensor, V: Tensor) -> None:
        """Let the update be U diag(S) Vᵀ, on the base as it is now (LoftQ); only asked of methods with triplets."""
        raise OptionError(f"{self.label()} has no factors that could be set to a given update")

    def formed(self) -> bool:
        """Whether at this site the module reads W′ in the place of W, for want of a cheaper exact form.

        What acts on outputs acts above it, so such a method cannot stand on one that does.
        """
        return False


class DeltaMethod(WeightMethod):
    """W′ = W + ΔW with a structured ΔW = `delta()`."""

    dropout: float = option(default=0.0, doc="dropout on the input of the update path", low=0.0, high=1.0)

    @abstractmethod
    def delta(self) -> Matrix:
        """ΔW as a structured matrix."""

    def drop(self, x: Tensor) -> Tensor:
        """x with this method's dropout."""
        if self.dropout == 0.0 or not self.training:
            return x
        if not x.is_floating_point():
            raise SiteError(f"{self.label()} at '{self.site.path}': dropout acts on vectors, an embedding reads ids")
        return nn.functional.dropout(x, self.dropout)

    def thins(self) -> bool:
        """Whether `thin` lets something rest now."""
        return False

    def thin(self, delta: Matrix) -> Matrix:
        """ΔW without what rests in this forward (dropout of rows or of the whole); all of it outside of training."""
        return delta

    def weight(self, W: Tensor) -> Tensor:
        return self.thin(self.delta()).added_to(W)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.site.add(self.thin(self.delta()), self.drop(x), y)

    def update(self) -> Matrix | None:
        return self.delta()

    def form(self) -> Form | None:
        b, delta = self.site.bias, self.delta()
        return Added(delta) if delta.remembers_input and not self.thins() and self.bias_of(b) is b else None

    def exact_now(self) -> bool:
        return self.dropout == 0.0 or not self.training


class HiddenMethod(Method):
    """Acts on the activations that enter or leave a module: `before(x)`, `after(x, y)`, last axis = features."""

    kind: ClassVar[str] = "hidden"


class PixelMethod(HiddenMethod):
    """Acts on the images a model reads, after their preprocessing: `before(x)`, x (batch, channels, height, width).

    `site.pixels` tells (channels, height, width).
    """

    kind: ClassVar[str] = "input"
    unmergeable: ClassVar[str] = (
        "it acts on the images before the model reads them, outside of every tensor of the base"
    )


class TokenMethod(Method):
    """Adds virtual tokens to the sequence a network reads; sites are the towers of `inlay.core.towers`."""

    kind: ClassVar[str] = "tokens"
    unmergeable: ClassVar[str] = "it adds tokens, which no tensor of the base can stand for"

    tokens: int = option(default=20, doc="virtual tokens p", low=1)

    @property
    def starts_at_base(self) -> bool:
        return False


class PromptMethod(TokenMethod):
    """X′ = [P; X]: vectors before the input embeddings, with positions of their own."""

    keep: bool = option(
        default=False, doc="leave the virtual tokens in the output (pooling and heads see them), as PEFT does"
    )

    @abstractmethod
    def prompt(self) -> Tensor:
        """P (p, d), in the space of the input embeddings."""

    def added(self, position: Tensor, n: int) -> Tensor | None:
        """What is added to the input embeddings of the user's tokens, (batch or 1, tokens, d); None for nothing.

        `position` (batch or 1, tokens) counts the user's tokens from 0, without padding before them; n is how many
        there are by now at most, those in the cache included.
        """
        return None


class InsertedMethod(TokenMethod):
    """[x_0, P_i, X]: vectors among a vision tower's hidden states, after the class token; cut off before pooling.

    Sites are vision towers; `site.tower.track` tells blocks and widths. See `inlay.core.inserted`.
    """

    @abstractmethod
    def inserted(self, i: int, x: Tensor) -> Tensor | None:
        """P_i (p, d), or (batch, p, d), that enters block i; None leaves there what block i − 1 made of them.

        P_0 must be given; it stands there before any normalisation that precedes the blocks. `x` (batch, channels,
        height, width) are the pixels that the tower reads, of the rows this method acts on.
        """


class PrefixMethod(TokenMethod):
    """K′ = [P_k; K], V′ = [P_v; V]: keys and values before those of the tokens, in each attention of the site."""

    shift: bool = option(default=False, doc="count the prefix in the positions of the tokens, as PEFT does")

    @abstractmethod
    def prefix(self, i: int) -> tuple[Tensor, Tensor]:
        """P_k and P_v, (key-value heads, p, head size) each, of the site's i-th attention."""


class SideAttentionMethod(TokenMethod):
    """O′ = O + `aside(i, q, scale)`: attention to tokens of the method's own, in a softmax apart from the base's."""

    tokens: int = option(default=10, doc="virtual tokens p", low=1)
    layers: int = option(default=30, doc="attentions that it acts in, counted from the top; all, if fewer", low=1)

    @property
    def starts_at_base(self) -> bool:
        return True

    @abstractmethod
    def aside(self, i: int, q: Tensor, scale: float | None) -> Tensor:
        """What is added to the site's i-th attention, (batch, heads, n, size) like its queries q, before attn.o.

        `scale` is the factor on the base's scores, None for 1/√size.
        """


class AttentionMethod(Method):
    """Computes the attention of a decoder in the base's stead; sites are towers, `site.parts` their attentions."""

    stretch: float = option(
        default=1.0, doc="s of rotary positions p/s, in evaluation too: target length over the base's context", low=1.0
    )

    @abstractmethod
    def attends(self) -> bool:
        """Whether it computes the attention now, or leaves it to the base (as most do in evaluation)."""

    @abstractmethod
    def attend(self, causal: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output (batch, heads, n, size) for whole sequences without padding, keys repeated for every head.

        `causal(q, k, v)` is causal attention with the base's scale and dropout, over any batch.
        """


class ParameterMethod(Method):
    """Trains its own copy of one tensor of the base, which stays as it was: p ↦ `parameter(p)`."""

    kind: ClassVar[str] = "weight"
    mergeable: ClassVar[bool] = True

    def build(self, site: Site) -> None:
        self.value = nn.Parameter(site.parameter.detach().to(site.dtype, copy=True))
        for name in self.follows(site):
            t = site.module._buffers[name]
            assert t is not None
            self.register_buffer(name, t.detach().clone())  # in the base's type: the module updates it in place

    def follows(self, site: Site) -> tuple[str, ...]:
        """Buffers of the module that are copied as well, and updated there in the base's stead; none by default."""
        return ()

    def count(self, site: Site) -> int:
        return site.parameter.numel()

    def parameter(self, p: Tensor) -> Tensor:
        return self.value.to(p.dtype)

    @abstractmethod
    def wants(self, module: nn.Module, name: str) -> bool:
        """Whether the parameter `name` that `module` holds is one this method trains."""


# ---------------------------------------------------------------------- registry
def register(cls: type[M]) -> type[M]:
    """Enter a final method into the catalogue; it is then offered, documented and tested by the laws."""
    if cls.name() in REGISTRY:
        raise ValueError(f"a method named '{cls.name()}' is registered already: {REGISTRY[cls.name()]}")
    if not cls.equation() or not cls.paper:
        raise ValueError(f"{cls.__name__} needs a docstring that begins with its equation, and a paper")
    REGISTRY[cls.name()] = cls
    return cls


def method_class(name: str) -> type[Method]:
    """The registered class of that name (any case, `-` and `_` ignored); OptionError lists the known ones."""
    import inlay.methods  # noqa: F401  (importing registers; here to break the cycle)

    key = re.sub(r"[-_ ]", "", name).lower()
    if key not in REGISTRY:
        raise OptionError(f"unknown method '{name}'{near(key, REGISTRY)} (known: {', '.join(sorted(REGISTRY))})")
    return REGISTRY[key]


def method_from(spec: Any) -> Method:
    """A method from plain data.

    Accepts a `Method`, a name (`"lora"`), a call (`"dora(of=vera(r=256))"`), or a mapping, either
    `{"method": "lora", "r": 8}` or `{"lora": {"r": 8}}`. Raises OptionError on unknown names and options.
    """
    if isinstance(spec, Method):
        return spec
    if isinstance(spec, str):
        from inlay.core.parse import parse_call

        name, given = parse_call(spec)
    elif isinstance(spec, dict) and "method" in spec:
        given = {k: v for k, v in spec.items() if k != "method"}
        name = spec["method"]
    elif isinstance(spec, dict) and len(spec) == 1:
        ((name, given),) = spec.items()
        given = given or {}
    else:
        raise OptionError(
            f"a method is a name, a call such as 'lora(r=8)' or a mapping {{name: options}}, got {spec!r}"
        )
    cls = method_class(name)
    known = options(cls)
    check_known(cls.__name__, given, known)
    return cls(**{k: method_from(v) if _takes_method(known[k].type) else v for k, v in given.items()})


def _takes_method(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Method)


def uniform(shape: tuple[int, ...], bound: float) -> Tensor:
    """U(−bound, bound) from the ambient generator."""
    return torch.empty(shape).uniform_(-bound, bound)


__all__ = [
    "REGISTRY", "AttentionMethod", "ComposeError", "DeltaMethod", "HiddenMethod", "InsertedMethod", "Method",
    "ParameterMethod", "PixelMethod", "Placement", "PrefixMethod", "PromptMethod", "SideAttentionMethod", "TokenMethod",
    "WeightMethod", "method_class", "method_from", "option", "register", "uniform",
]  # fmt: skip
