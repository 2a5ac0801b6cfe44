"""Recipes: what to train or compare, as typed fields that are the only schema of YAML files and command-line flags."""

# ruff: noqa: RUF009  (`option` returns a dataclass field)
from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from inlay.core.companion import Companion
from inlay.core.errors import OptionError
from inlay.core.method import Method, Placement, method_class, method_from
from inlay.core.options import check_known, option, options

MethodSpec = str | dict[str, Any] | list[Any]
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Model, data and training: what a single run and a comparison have in common."""

    # ------------------------------------------------------------------ model and data
    model: str = option(doc="embedded name, folder, GGUF file or Hugging Face name")
    data: str = option(doc="embedded name, file, folder or Hugging Face data set")
    task: str | None = option(default=None, doc="task, where the data leave a choice")
    columns: dict[str, str] = option(default={}, doc="canonical field to column name, where names do not tell")
    limit: int | dict[str, int] | None = option(default=None, doc="rows to keep, per split or in every split")
    max_length: int | None = option(default=None, doc="tokens kept per row", low=1)
    image_size: int | None = option(default=None, doc="side of images in pixels", low=1)
    template: str | None = option(default=None, doc="chat template (Jinja) instead of the tokenizer's own")
    prompt: str | None = option(
        default=None, doc="classify images by the text of their classes, {} in this prompt; for image-text models"
    )
    # ------------------------------------------------------------------ where the method goes
    where: list[str] | None = option(default=None, doc="places to adapt; each method's own when null")
    exclude: list[str] = option(default=[], doc="places to leave out")
    layers: list[int] | None = option(default=None, doc="blocks to adapt; all when null")
    overrides: dict[str, dict[str, Any]] = option(default={}, doc="method options that differ at some places")
    head: Literal["auto"] | list[str] | None = option(default="auto", doc="task-head modules trained beside the method")
    # ------------------------------------------------------------------ training
    epochs: float = option(default=3.0, doc="passes over the training rows", low=0.0)
    steps: int | None = option(default=None, doc="optimiser steps, instead of epochs", low=1)
    batch: int = option(default=32, doc="rows per forward pass", low=1)
    bucket: bool = option(default=True, doc="put rows of similar length into one batch, for less padding")
    accumulate: int = option(default=1, doc="batches per optimiser step", low=1)
    learning_rate: float | None = option(default=None, doc="peak rate; each method's own when null", low=0.0)
    rate_factor: float = option(
        default=1.0, doc="factor on the methods' own rates; 0.1 to 0.3 suits ViTs and long runs", low=0.0
    )
    head_learning_rate: float | None = option(default=None, doc="peak rate of the task head", low=0.0)
    schedule: Literal["linear", "cosine", "constant"] = option(default="linear", doc="decay after the warm-up")
    warmup: float = option(default=0.06, doc="share of steps in which the rate rises from zero", low=0.0, high=1.0)
    weight_decay: float = option(default=0.0, doc="AdamW's decay of matrices (vectors never decay)", low=0.0)
    clip: float | None = option(default=1.0, doc="largest gradient norm; null for none", low=0.0)
    lora_plus: float | None = option(
        default=None, doc="LoRA+ ratio λ: B-like tensors learn at λ times the rate; 16 is the paper's", low=0.0
    )
    calibration: int = option(
        default=8, doc="training batches that methods which start from data (EVA, CorDA, LoRA-SB, SCT) see first", low=1
    )
    base_dropout: bool = option(default=True, doc="keep the base's own dropout while training")
    precision: Literal["float32", "bfloat16", "autocast"] = option(
        default="float32",
        doc="bfloat16: the base is held in it; autocast: matrix products are computed in it",
    )
    quantize: Literal["nf4", "int8", "int4"] | None = option(
        default=None, doc="hold the base's linear layers in few bits: NormalFloat, or affine (QLoRA is LoRA on nf4)"
    )
    quantize_group: int | None = option(
        default=None, doc="inputs that share a scale on an affine base; null: 64 in int4, a whole row in int8", low=1
    )
    loftq: int = option(
        default=0, doc="LoftQ: times that base and low-rank update are fitted to each other; 0: only rounded", low=0
    )
    gradient_checkpointing: bool = option(default=False, doc="recompute activations in the backward pass")
    cache: Literal["auto", "memory", "disk", False] = option(  # YAML reads `off` as False
        default="auto",
        doc="compute what the frozen blocks below the lowest adapted place give once per row, and keep it: auto (where "
        "that pays, in memory or, beyond cache_limit, on disk), memory, disk or off",
    )
    cache_limit: float = option(
        default=2.0, doc="GB of memory that this may take; on disk up to ten times as much", low=0.0
    )
    cache_dtype: Literal["exact", "bfloat16"] = option(
        default="exact", doc="how it is kept: as computed, or rounded, in half the bytes of float32"
    )
    device: str = option(default="auto", doc="auto, cpu, cuda or cuda:N")
    # ------------------------------------------------------------------ evaluation
    evaluate_every: int | None = option(default=None, doc="steps between evaluations; once per epoch when null", low=1)
    evaluate_batch: int = option(default=128, doc="rows per forward pass in evaluation", low=1)
    metric: str | None = option(default=None, doc="metric that selects the best adapter; the task's own when null")
    patience: int | None = option(
        default=None, doc="stop after this many evaluations without a better one and keep the best", low=1
    )
    # ------------------------------------------------------------------ files
    checkpoint_every: int | None = option(default=200, doc="steps between checkpoints; null for none", low=1)
    keep_last: int = option(default=1, doc="checkpoints kept", low=1)
    tensorboard: bool = option(default=False, doc="write TensorBoard logs")

    def __post_init__(self) -> None:
        for name, opt in options(type(self)).items():
            value = getattr(self, name)
            if value is dataclasses.MISSING:
                raise OptionError(f"a recipe needs '{name}': {opt.doc}")
            object.__setattr__(self, name, opt.check("the recipe", value))
        if not self.base_dropout and self.gradient_checkpointing:
            raise OptionError("gradient_checkpointing recomputes in training mode only: leave base_dropout on with it")
        if self.quantize_group is not None and self.quantize not in ("int8", "int4"):
            raise OptionError("quantize_group is for an affine base: set quantize to int8 or int4")
        if self.loftq and self.quantize is None:
            raise OptionError("loftq fits a quantised base: say how it is stored, quantize: nf4")
        if self.steps is None and self.epochs == 0:
            raise OptionError("nothing to train: epochs is 0 and steps is not given")


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """One adapter: a method (or several) trained on one data set."""

    method: MethodSpec = option(doc="method, as a name, a call such as lora(r=8), a mapping, or a list of these")
    seed: int = option(default=0, doc="seed of initial values, order and dropout", low=0)
    output: str = option(default="runs/adapter", doc="folder of the adapter, its checkpoints and logs")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.placements()

    def placements(self) -> list[Placement]:
        """The methods with their places; `{method: …, where: […]}` in a list gives one its own."""
        several = self.method if isinstance(self.method, list) else [self.method]
        if not several:
            raise OptionError("the recipe names no method")
        return [placement_from(spec) for spec in several]

    def methods(self) -> list[Method]:
        """The methods alone."""
        return [p.method for p in self.placements()]

    def label(self) -> str:
        """`LoRA(r=4)`, several joined by ` + `."""
        return " + ".join(m.label() for m in self.methods())


@dataclass(frozen=True, kw_only=True)
class CompareRecipe(Settings):
    """Many methods on one data set, each with several seeds."""

    methods: list[MethodSpec] = option(
        doc="methods; or {method: …, label: …, seeds: […]} with any training field, which then differs for that row; "
        "`all` stands for every method that is no row of its own and needs none beside it"
    )
    seeds: list[int] = option(default=[0], doc="seeds of every row")
    title: str = option(default="", doc="heading of the report")
    workers: int | None = option(default=None, doc="cells trained at once, each on its share of the cores", low=1)
    output: str = option(default="runs/comparison", doc="folder of the report and of finished cells")

    def __post_init__(self) -> None:
        super().__post_init__()
        labels: set[str] = set()
        for row in self.rows():
            if row.label in labels:
                raise OptionError(f"two rows are called '{row.label}': give one of them a label of its own")
            labels.add(row.label)
        if not labels:
            raise OptionError("the recipe names no methods to compare")

    def rows(self) -> list[Row]:
        """Every row of the comparison with its own recipe (seed and output left at their defaults)."""
        common = {name: getattr(self, name) for name in options(Settings)}
        rows = [row_from(spec, common, self.seeds) for spec in self.methods if spec != ALL]
        if ALL in self.methods:
            from inlay.catalogue import names  # importing it registers every method

            each = [row.recipe.methods() for row in rows]
            taken = {type(m).name() for methods in each for m in methods if len(methods) == 1 or not m.has_sites}
            at = self.methods.index(ALL)
            alone = [name for name in names() if name not in taken and not issubclass(method_class(name), Companion)]
            rows[at:at] = [row_from(name, common, self.seeds) for name in alone]
        return rows


@dataclass(frozen=True)
class Row:
    """One row of a comparison: a label, its seeds and the recipe they share."""

    label: str
    seeds: list[int]
    recipe: Recipe


R = TypeVar("R", Recipe, CompareRecipe)


def load_recipe(source: str | Path | dict[str, Any] | None, cls: type[R], overrides: dict[str, Any] | None = None) -> R:
    """A recipe from a YAML file or a mapping, with some fields replaced.

    Raises:
        OptionError: a file that cannot be read, unknown fields (the known ones are listed), wrong types or values.
    """
    given = read(source) if isinstance(source, str | Path) else dict(source or {})
    given |= overrides or {}
    known = options(cls)
    owner = str(source) if isinstance(source, str | Path) else "the recipe"
    for field, command in (("methods", "compare"), ("method", "train")):
        if field in given and field not in known:
            raise OptionError(f"{owner} has '{field}': a recipe for `inlay {command}`")
    check_known(owner, given, known)
    for name, opt in known.items():
        if opt.default is dataclasses.MISSING and name not in given:
            raise OptionError(f"{owner} needs '{name}': {opt.doc}")
    return cls(**given)


def rows_at(source: str | Path, overrides: dict[str, Any] | None = None) -> list[Row]:
    """The rows of a recipe file of either kind; one for `inlay train` is a single row."""
    given = read(source) | (overrides or {})
    if "methods" in given:
        return load_recipe(source, CompareRecipe, overrides).rows()
    recipe = load_recipe(source, Recipe, overrides)
    return [Row(recipe.label(), [recipe.seed], recipe)]


def as_dict(recipe: Settings) -> dict[str, Any]:
    """Every field as plain data; `load_recipe` reads it back."""
    return {name: getattr(recipe, name) for name in options(type(recipe))}


def dump(recipe: Settings) -> str:
    """The recipe as YAML."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False, allow_unicode=True)


def parse_value(text: str) -> Any:
    """A flag's text as YAML reads it, so that flags and files mean the same: `1e-3`, `[0, 1]`, `null`."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise OptionError(f"cannot read the value {text!r}: {yaml_problem(error)}") from None


# ---------------------------------------------------------------------- YAML
class Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read(path: str | Path) -> dict[str, Any]:
    """The mapping a YAML file holds."""
    try:
        document = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise OptionError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is not YAML: {yaml_problem(error)}") from None
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise OptionError(f"{path} holds no recipe: it must be a mapping of fields, such as 'model: minilm'")
    return document


def yaml_problem(error: Exception) -> str:
    """What is wrong with a text, and in which line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return " ".join(str(error).split())


# ---------------------------------------------------------------------- methods in recipes
def placement_from(spec: Any) -> Placement:
    """A method of a recipe's list, with places of its own if it names some."""
    if isinstance(spec, dict) and "method" in spec and "where" in spec:
        where = spec["where"]
        if not isinstance(where, list) or not all(isinstance(w, str) for w in where):
            raise OptionError(f"'where' of a method must be list[str], got {where!r}")
        return Placement(inner_method({k: v for k, v in spec.items() if k != "where"}), tuple(where))
    return Placement(inner_method(spec))


def inner_method(spec: Any) -> Method:
    """A method from `{method: lora(r=8)}` as well as from all that `method_from` takes."""
    return method_from(spec["method"] if isinstance(spec, dict) and list(spec) == ["method"] else spec)


def row_from(spec: MethodSpec, common: dict[str, Any], seeds: list[int]) -> Row:
    """A row of a comparison: fields of training are its own settings, the other keys are the method's options."""
    label, changes, method = None, {}, spec
    if isinstance(spec, dict) and "method" in spec:
        rest = {k: v for k, v in spec.items() if k != "method"}
        label, seeds = rest.pop("label", None), rest.pop("seeds", seeds)
        name = spec["method"]
        own = options(method_class(name)) if isinstance(name, str) and "(" not in name else {}
        changes = {k: rest.pop(k) for k in list(rest) if k in common}
        for key in changes:
            if key in ("data", "task", "columns", "limit"):
                raise OptionError(f"the rows of a comparison share their data: '{key}' belongs to the whole recipe")
            if key in own:
                raise OptionError(
                    f"'{key}' is an option of {name} and a field of training: write {{method: {{{name}: …}}, {key}: …}}"
                )
        if rest and not own:
            known = {**options(Settings), "label": None, "seeds": None}
            check_known("a row of the comparison", rest, known)  # type: ignore[arg-type]
        method = {"method": name, **rest} if rest else name
    recipe = Recipe(**{**common, **changes}, method=method)
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise OptionError(f"seeds must be a list of whole numbers, got {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise OptionError(f"a seed is given twice in {seeds}")
    return Row(label or recipe.label(), seeds, recipe)
