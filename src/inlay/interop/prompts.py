"""PEFT's PROMPT_TUNING, P_TUNING and PREFIX_TUNING."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from inlay.core.errors import CheckpointError
from inlay.core.levels import Level
from inlay.core.method import Method, PromptMethod
from inlay.core.sites import Site
from inlay.core.towers import Tower, towers
from inlay.interop.family import Family, Part, Reading, Writing, cannot
from inlay.interop.fields import COMMON, SAVED, Field, idle, need, read
from inlay.interop.matching import TASK_HEADS, saved_modules, task_of
from inlay.methods.tokens.deepprompt import DeepPrompt
from inlay.methods.tokens.prefixtuning import PrefixTuning
from inlay.methods.tokens.prompttuning import PromptTuning
from inlay.methods.tokens.ptuning import PTuning

VIRTUAL = (
    *(field for field in COMMON if field.name != "task_type"), SAVED,
    read("task_type", str | None, why="a classifier that pools the first token pools a virtual one: keep=True"),
    need("num_virtual_tokens", int),
    read("num_transformer_submodules", int | None, why="1 alone: PEFT's 2 are those of encoder-decoders"),
    idle("token_dim", "the model and the tensor tell"), idle("num_layers", "the model tells"),
    idle("num_attention_heads", "the model tells"),
)  # fmt: skip
KEY = "prompt_embeddings"
OUTPUTS = (
    "Outputs are those of the user's tokens, which PEFT gives after the virtual ones; a left-padded row has its "
    "virtual tokens after the padding, PEFT's has them before it"
)


class VirtualFamily(Family):
    """Virtual tokens before one tower: PEFT has them in one table, whatever made them."""

    prefix: ClassVar[str] = "base_model."

    @abstractmethod
    def method(self, tokens: int, keep: bool) -> PromptMethod:
        """What is read."""

    @abstractmethod
    def configured(self, method: Method) -> dict[str, Any]:
        """The fields of this family."""

    def read(self, reading: Reading) -> list[Part]:
        keep = reading.config["task_type"] == "SEQ_CLS" and pools_first(reading.model)
        spec = self.method(virtual_tokens(reading), keep)
        (site,) = reading.finder.sites(spec, [""], reading.dtype)
        return [Part(spec, site, {"P": reading.take(KEY)})]

    def write(self, writing: Writing, levels: Sequence[Level]) -> None:
        level = only(writing, levels)
        method = level.method
        assert isinstance(method, PromptMethod)
        if pools_first(writing.model) and not method.keep:
            raise cannot(f"PEFT lets the classifier pool a virtual token: that is {type(method).__name__}(keep=True)")
        writing.tensors[KEY] = method.stored()["P"]
        writing.config |= describe(writing, level.site, method.tokens) | self.configured(method)


class PromptFamily(VirtualFamily):
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    note: ClassVar[str] = f"PromptTuning of one tower. {OUTPUTS}"
    fields: ClassVar[tuple[Field, ...]] = (
        *VIRTUAL,
        idle("prompt_tuning_init", "the tensor is in the folder"),
        idle("prompt_tuning_init_text", "the tensor is in the folder"),
        idle("tokenizer_name_or_path", "the tensor is in the folder"),
        idle("tokenizer_kwargs", "the tensor is in the folder"),
    )

    def takes(self, method: Method) -> bool:
        return isinstance(method, PromptTuning)

    def method(self, tokens: int, keep: bool) -> PromptMethod:
        return PromptTuning(tokens=tokens, init="random", keep=keep)

    def configured(self, method: Method) -> dict[str, Any]:
        return {"prompt_tuning_init": "RANDOM"}


class EncodedFamily(VirtualFamily):
    peft_type: ClassVar[str] = "P_TUNING"
    note: ClassVar[str] = f"PTuning of one tower, its encoder folded away. {OUTPUTS}"
    fields: ClassVar[tuple[Field, ...]] = (
        *VIRTUAL,
        idle("encoder_reparameterization_type", "PEFT folds the encoder away when it saves"),
        idle("encoder_hidden_size", "the width of that encoder"),
        idle("encoder_num_layers", "the depth of that encoder"),
        idle("encoder_dropout", "in that encoder"),
    )

    def takes(self, method: Method) -> bool:
        return isinstance(method, PTuning)

    def method(self, tokens: int, keep: bool) -> PromptMethod:
        return PTuning(tokens=tokens, keep=keep)

    def configured(self, method: Method) -> dict[str, Any]:
        assert isinstance(method, PTuning)
        return {
            "encoder_reparameterization_type": method.encoder.upper(),
            "encoder_hidden_size": method.units(method.site.features), "encoder_num_layers": method.layers,
        }  # fmt: skip


class PrefixFamily(Family):
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    note: ClassVar[str] = (
        "PrefixTuning(shift=True), or PTuningV2(shift=True), of every self-attention of one tower, its MLP folded away"
    )
    prefix: ClassVar[str] = "base_model."
    fields: ClassVar[tuple[Field, ...]] = (
        *VIRTUAL,
        idle("prefix_projection", "PEFT folds the MLP away when it saves"),
        idle("encoder_hidden_size", "the width of that MLP"),
        idle("init_weights", "the tensor is in the folder"),
    )

    def takes(self, method: Method) -> bool:
        return isinstance(method, DeepPrompt)

    def read(self, reading: Reading) -> list[Part]:
        spec = PrefixTuning(tokens=virtual_tokens(reading), shift=True)
        site = reading.finder.sites(spec, ["attn"], reading.dtype)[0]
        assert site.tower is not None
        heads, size = site.tower.spots[0].heads, site.tower.spots[0].size
        P, width = reading.take(KEY), 2 * len(site.parts) * heads * size
        if P.shape != (spec.tokens, width):
            raise CheckpointError(
                f"{reading.folder}: '{KEY}' is {tuple(P.shape)}, keys and values of {len(site.parts)} attentions with "
                f"{heads} heads of {size} need {(spec.tokens, width)}: wrong base?"
            )
        keys, values = P.view(spec.tokens, len(site.parts), 2, heads, size).permute(2, 1, 3, 0, 4)
        return [Part(spec, site, {"P_k": keys, "P_v": values})]

    def write(self, writing: Writing, levels: Sequence[Level]) -> None:
        level = only(writing, levels)
        method, site = level.method, level.site
        assert isinstance(method, DeepPrompt)
        assert site.tower is not None
        if not method.shift:
            raise cannot(
                f"PEFT counts the prefix in the positions of the tokens: that is {type(method).__name__}(shift=True)"
            )
        if [spot.path for spot in site.tower.spots] != site.parts:
            raise cannot("PEFT puts a prefix before every attention, this one leaves some out")
        stored = method.stored()
        writing.tensors[KEY] = prefix_like(stored["P_k"], stored["P_v"])
        heads, size = method.shape
        writing.config |= describe(writing, site, method.tokens) | {
            "num_attention_heads": heads, "token_dim": heads * size, "encoder_hidden_size": heads * size,
            "prefix_projection": False,
        }  # fmt: skip


def prefix_like(keys: Tensor, values: Tensor) -> Tensor:
    """(L, heads, p, size) keys and values as PEFT has them: (p, L · 2 · heads · size)."""
    both = keys.new_zeros(2, *keys.shape)
    both[0], both[1] = keys, values
    return both.permute(3, 1, 0, 2, 4).flatten(1)


def virtual_tokens(reading: Reading) -> int:
    """p; refused for encoder-decoders, whose two towers PEFT feeds from one tensor."""
    towers = reading.config["num_transformer_submodules"]
    if (towers or 1) != 1 or encodes_and_decodes(reading.model):
        raise CheckpointError(
            f"{reading.folder}: 'num_transformer_submodules' = {towers} cannot be read: of an encoder-decoder PEFT "
            "feeds two towers from one tensor"
        )
    return reading.config["num_virtual_tokens"]


def only(writing: Writing, levels: Sequence[Level]) -> Level:
    """The one tower PEFT knows."""
    site = levels[0].site
    if len(levels) != 1 or encodes_and_decodes(writing.model) or site.tower is None:
        raise cannot("PEFT has one prompt or prefix, and splits it between the towers of an encoder-decoder")
    first: Tower = towers(writing.model)[0]
    if (site.tower.label, site.tower.root) != (first.label, first.root):
        raise cannot(f"PEFT knows the tower that reads the model's tokens, not '{site.tower.root}'")
    return levels[0]


def describe(writing: Writing, site: Site, tokens: int) -> dict[str, Any]:
    """The fields that tell the task, without which PEFT adds no virtual tokens, and the sizes of the tower."""
    assert site.tower is not None
    task = task_of(writing.model) or "FEATURE_EXTRACTION"
    if task in TASK_HEADS and not writing.saved:  # PEFT expects the head in the folder, trained or not
        writing.saved = saved_modules(writing.model, TASK_HEADS[task])
        for path in writing.saved:
            head = writing.model.get_submodule(path).state_dict()
            writing.tensors |= {f"{path}.{name}": t for name, t in head.items()}
    return {
        "task_type": task,
        "num_virtual_tokens": tokens, "num_transformer_submodules": 1, "num_layers": len(site.tower.spots),
        "num_attention_heads": site.tower.spots[0].heads, "token_dim": site.features,
    }  # fmt: skip


def encodes_and_decodes(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def pools_first(model: nn.Module) -> bool:
    """Whether a sequence classifier pools the first token (encoders do; decoders pool the last)."""
    kind = type(model).__name__
    return kind.endswith("ForSequenceClassification") and "score" not in model._modules
