"""PEFT's rules of which modules a configuration names, in both directions, restated from its behaviour."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from inlay.core.base import base_modules
from inlay.core.where import inside

HEADS = ("score", "classifier")
"""Names PEFT takes for the head of a sequence classifier."""
TASKS = {
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS", "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
}  # fmt: skip
"""PEFT's task types by the ending of the model's class."""
TASK_HEADS = {"SEQ_CLS": HEADS, "TOKEN_CLS": HEADS, "QUESTION_ANS": ("qa_outputs",)}
"""Modules that PEFT trains and saves with a task whether asked to or not."""


def task_of(model: nn.Module) -> str | None:
    """PEFT's task type for a model of transformers."""
    return next((task for ending, task in TASKS.items() if type(model).__name__.endswith(ending)), None)


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base's modules by path, without the root and without what inlay attached."""
    yield from ((path, module) for path, module in base_modules(model).items() if path)


def ends(path: str, names: Iterable[str]) -> bool:
    """Whether a path is one of the names or ends with one of them after a dot."""
    return any(path == name or path.endswith("." + name) for name in names)


@dataclass(frozen=True)
class Targets:
    """What a configuration says about modules."""

    target: list[str] | str | None
    exclude: list[str] | str | None = None
    layers: list[int] | int | None = None
    pattern: list[str] | str | None = None
    saved: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: dict[str, Any]) -> Targets:
        get = config.get
        return cls(
            config["target_modules"], get("exclude_modules"), get("layers_to_transform"), get("layers_pattern"),
            tuple(get("modules_to_save") or ()),
        )  # fmt: skip

    def match(self, path: str) -> bool:
        """Whether the module at `path` is adapted."""
        if self.target is None or self.excluded(path):
            return False
        if isinstance(self.target, str):
            return re.fullmatch(self.target, path) is not None
        if path in self.target:
            return True  # a full name is not subject to `layers_to_transform`
        return ends(path, self.target) and self.in_layers(path)

    def excluded(self, path: str) -> bool:
        if isinstance(self.exclude, str) and re.fullmatch(self.exclude, path):
            return True
        if isinstance(self.exclude, list) and ends(path, self.exclude):
            return True
        return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.saved)

    def in_layers(self, path: str) -> bool:
        if self.layers is None or self.layers == []:
            return True
        names = [self.pattern] if isinstance(self.pattern, str) else self.pattern
        rules = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in names or ()] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next((m for rule in rules if (m := re.match(rule, path))), None)
        wanted = [self.layers] if isinstance(self.layers, int) else self.layers
        return found is not None and int(found["idx"]) in wanted

    def paths(self, model: nn.Module) -> list[str]:
        """The adapted modules, in model order."""
        if isinstance(self.target, str) and self.target.lower() == "all-linear":
            return [path for path in all_linear(model) if not self.excluded(path)]
        return [path for path, _ in modules(model) if self.match(path)]


def all_linear(model: nn.Module) -> list[str]:
    """Every linear layer and Conv1D but the output layer of a language model or the head of a classifier."""
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    leave = None
    if isinstance(model, PreTrainedModel):
        leave = model.get_output_embeddings()
        if leave is None and type(model).__name__.endswith("ForSequenceClassification"):
            leave = next((model._modules[name] for name in HEADS if name in model._modules), None)
    return [p for p, m in modules(model) if isinstance(m, nn.Linear | Conv1D) and m is not leave]


def parameters(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """Parameters named by `target_parameters`: module path → names, in the order in which PEFT wraps them."""
    found: dict[str, list[str]] = {}
    for path, module in modules(model):
        hits = [name for name, p in module._parameters.items() if p is not None and ends(f"{path}.{name}", names)]
        if hits:
            found[path] = hits
    return found


def saved_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Modules that `modules_to_save` names: any path that ends with one of the names, the outermost ones."""
    names, found = tuple(names), list[str]()
    for path, _ in modules(model):
        if any(path.endswith(name) for name in names) and not any(inside(path, outer) for outer in found):
            found.append(path)
    return found


def value_at(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says for a path: the first pattern that matches its end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


# ---------------------------------------------------------------------- the other direction
def name_targets(model: nn.Module, paths: Sequence[str], saved: Sequence[str]) -> list[str] | str:
    """The shortest `target_modules` that name exactly these modules: endings, whole paths, or an expression."""
    for parts in range(1, 1 + max((path.count(".") + 1 for path in paths), default=0)):
        names = sorted({".".join(path.split(".")[-parts:]) for path in paths})
        if set(Targets(names, saved=tuple(saved)).paths(model)) == set(paths):
            return names
    return "|".join(re.escape(path) for path in paths) if paths else []


def name_pattern(path: str) -> str:
    """A key of `rank_pattern` that matches one path alone."""
    return "^" + re.escape(path)


def common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the value most have, those of the others by pattern)."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {name_pattern(key): value for key, value in values.items() if value != most}


def tidy(alpha: float) -> float | int:
    """α as PEFT has it: a whole number where it is one."""
    return int(alpha) if alpha == int(alpha) else alpha
