"""PEFT's LORA: LoRA and DoRA of LoRA, on modules and on stacks of experts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from inlay.core.errors import CheckpointError
from inlay.core.hosts import LinearHost, StoredHost
from inlay.core.levels import Level
from inlay.core.method import Method
from inlay.core.sites import Site
from inlay.interop import lora_layout as layout
from inlay.interop.family import Family, Part, Reading, Writing, cannot, one_value
from inlay.interop.fields import COMMON, LAYERS, STORED_TRANSPOSED, TARGETS, Field, idle, need, read, refuse
from inlay.interop.matching import common, parameters, tidy, value_at
from inlay.methods.weight.dora import DoRA
from inlay.methods.weight.lora import LoRA

INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initial values that leave the base as it was; all others move part of W into the update."""
MHA = (
    "PEFT 0.21.2 adds the update of nn.MultiheadAttention's out_proj twice, so what the tensors mean depends on its "
    "version (target_parameters reaches in_proj_weight alone)"
)


class LoraFamily(Family):
    peft_type: ClassVar[str] = "LORA"
    note: ClassVar[str] = (
        "LoRA, DoRA(of=LoRA): Linear, Conv1D, convolutions without groups, Embedding, stacks of experts; other updates "
        "of low rank (LoRA-FA, LoRA-XS, NOLA, PiSSA, EVA, DyLoRA, Delta-LoRA, ReLoRA, DoRA of VeRA) are written as the "
        "LoRA that they are"
    )
    fields: ClassVar[tuple[Field, ...]] = (
        *COMMON, *TARGETS, *LAYERS, STORED_TRANSPOSED,
        need("r", int), need("lora_alpha", float),
        read("lora_dropout", float, 0.0, "on embeddings PEFT does not apply it, so it is 0 there"),
        read("use_rslora", bool, False), read("use_dora", bool, False),
        read("rank_pattern", dict[str, int] | None), read("alpha_pattern", dict[str, float] | None),
        read("bias", str, "none", "'all' and 'lora_only' are BitFit beside LoRA"),
        read("lora_bias", bool, False, "LoRA(bias=True), where the base has a bias"),
        read("target_parameters", list[str] | None, why="stacks of experts and weights of linear layers"),
        read("init_lora_weights", bool | str | None, True, "values that change the base's weights are refused"),
        idle("runtime_config", "not a property of the adapter"),
        idle("megatron_core", "read with megatron_config alone"),
        idle("qalora_group_size", "read with use_qalora alone"),
        idle("loftq_config", "see init_lora_weights"), idle("eva_config", "see init_lora_weights"),
        idle("corda_config", "see init_lora_weights"), idle("lora_ga_config", "see init_lora_weights"),
        refuse("megatron_config", "its layers are split over processes in Megatron's own way"),
        refuse("trainable_token_indices", "inlay has no method that trains chosen rows of an embedding"),
        refuse("layer_replication", "it makes another base model, whose layers share weights"),
        refuse("ensure_weight_tying", "inlay's updates do not follow tied weights"),
        refuse("alora_invocation_tokens", "the update acts after an invocation sequence only (aLoRA)"),
        refuse("arrow_config", "it routes between other adapters (Arrow)"),
        refuse("use_qalora", "the update acts on pooled inputs (QA-LoRA)"),
        refuse("use_bdlora", "the factors are block-diagonal (BD-LoRA)"),
        refuse("kasa_config", "the base's small singular values are cut away (KaSA)"),
        refuse("monteclora_config", "the update is sampled (MonteCLoRA)"),
        refuse("velora_config", "the backward pass is compressed (VeLoRA)"),
    )  # fmt: skip

    def takes(self, method: Method) -> bool:
        return layout.takes(method)

    # ------------------------------------------------------------------ reading
    def read(self, reading: Reading) -> list[Part]:
        config = reading.config
        init = config["init_lora_weights"]
        if init is not None and (init.lower() if isinstance(init, str) else init) not in INITS:
            raise CheckpointError(
                f"{reading.folder}: 'init_lora_weights' = {init!r} moved part of the base's weights into the update: "
                "the tensors are relative to a changed base. Save it with PEFT's "
                "save_pretrained(…, path_initial_model_for_weight_conversion=…), which makes it a plain LoRA"
            )
        spec = LoRA(
            r=config["r"], alpha=config["lora_alpha"], rank_stabilized=config["use_rslora"],
            dropout=config["lora_dropout"], bias=config["lora_bias"],
        )  # fmt: skip
        parts: list[Part] = []
        for path, names in parameters(reading.model, config["target_parameters"] or []).items():
            # each parameter wraps the module once more: the last one outermost
            for depth, name in enumerate(reversed(names)):
                parts += self.read_parameter(reading, spec, path, name, path + ".base_layer" * depth)
        paths = reading.targets()
        for path in paths:
            if isinstance(reading.model.get_submodule(path), nn.MultiheadAttention):
                raise CheckpointError(f"{reading.folder}: '{path}' cannot be read: {MHA}")
        for path, site in reading.sites(spec, paths).items():
            parts.append(self.read_module(reading, spec, path, site))
        if not parts:
            raise CheckpointError(f"{reading.folder}: the configuration names no module and no parameter")
        reading.adapted += paths
        return parts

    def read_module(self, reading: Reading, spec: LoRA, path: str, site: Site) -> Part:
        reason = layout.conv_differs(site.module)
        if reason:
            raise CheckpointError(f"{reading.folder}: '{path}' cannot be read: {reason}")
        names = ("lora_embedding_A", "lora_embedding_B") if site.is_embedding else ("lora_A.weight", "lora_B.weight")
        A, B = (reading.matrix(f"{path}.{name}") for name in names)
        tensors = {"A": A, "B": B}
        if f"{path}.lora_B.bias" in reading.left:
            bias = reading.take(f"{path}.lora_B.bias")
            if site.bias is not None:
                tensors["b"] = bias
            elif bias.any():
                raise CheckpointError(
                    f"{reading.folder}: 'lora_bias' cannot be read: '{path}' has no bias that the update's could join"
                )
        lora = self.spec_at(reading, spec, path, A, site)
        if not reading.config["use_dora"]:
            return Part(lora, site, tensors)
        m = reading.take(f"{path}.lora_magnitude_vector").flatten()
        return Part(DoRA(of=lora), site, {"m": m} | {f"of.{name}": t for name, t in tensors.items()})

    def read_parameter(self, reading: Reading, spec: LoRA, path: str, name: str, key: str) -> Iterator[Part]:
        """`target_parameters`: one matrix, or one per expert of a stack."""
        full = f"{path}.{name}"
        pattern = "re:" + re.escape(path) if name == "weight" else full
        found = reading.finder.sites(spec, [pattern], reading.dtype)
        sites = [site for site in found if site.path == path and site.param == name]
        if not sites or not (unhooked(sites[0]) or type(sites[0].host) is LinearHost):
            raise CheckpointError(
                f"{reading.folder}: target_parameters '{full}' is no linear weight and no stack of them"
            )
        A, B = reading.matrix(f"{key}.lora_A.weight"), reading.matrix(f"{key}.lora_B.weight")
        if A.shape[0] != B.shape[1] or A.shape[0] % len(sites):
            raise CheckpointError(
                f"{reading.folder}: factors {tuple(A.shape)} and {tuple(B.shape)} of '{full}' are none of {len(sites)} "
                "matrices: wrong base?"
            )
        matrices = layout.split(A, B, len(sites)) if sites[0].expert is not None else [(A, B)]
        for site, (a, b) in zip(sites, matrices, strict=True):
            yield Part(self.spec_at(reading, spec, full, a, site), site, {"A": a, "B": b})

    def spec_at(self, reading: Reading, spec: LoRA, key: str, A: Tensor, site: Site) -> LoRA:
        """The options of one site; the tensors must have the rank that the configuration says."""
        r = value_at(reading.config["rank_pattern"], key, spec.r)
        if A.shape[0] != r:
            raise CheckpointError(f"{reading.folder}: '{key}' has rank {A.shape[0]}, the configuration says {r}")
        alpha = value_at(reading.config["alpha_pattern"], key, spec.alpha)
        return spec.replace(r=r, alpha=alpha, dropout=0.0 if site.is_embedding else spec.dropout)

    # ------------------------------------------------------------------ writing
    def write(self, writing: Writing, levels: Sequence[Level]) -> None:
        methods = [level.method for level in levels]
        inner = [layout.lora_of(method) for method in methods]
        dora = one_value((isinstance(m, DoRA) for m in methods), "choice of DoRA")
        looked_up = [lv.site.is_embedding for lv in levels]
        dropout = [lora.dropout for lora, ids in zip(inner, looked_up, strict=True) if not ids] or [0.0]
        config: dict[str, Any] = {
            "use_dora": dora,
            "use_rslora": one_value((m.rank_stabilized for m in inner), "rank_stabilized"),
            "lora_dropout": one_value(dropout, "dropout"),
            "lora_bias": one_value((m.bias for m in inner), "bias option"),
            "init_lora_weights": True,
            "fan_in_fan_out": any(type(level.site.module).__name__ == "Conv1D" for level in levels),
        }
        groups: dict[tuple[str, str], list[Level]] = {}
        for level, lora in zip(levels, inner, strict=True):
            if lora.r:  # EVA may have left a place with no rank
                groups.setdefault((level.site.path, level.site.param), []).append(level)
        ranks, alphas = dict[str, int](), dict[str, float]()
        stacked = [key for key, group in groups.items() if unhooked(group[0].site)]
        if stacked and (dora or config["lora_dropout"] or config["lora_bias"]):
            raise cannot("with target_parameters (stacks of experts, in_proj_weight) PEFT has no DoRA, dropout or bias")
        if dora and config["lora_bias"]:
            raise cannot("PEFT has no lora_bias with DoRA")
        for (path, param), group in groups.items():
            key = f"{path}.{param}" if (path, param) in stacked else path
            update = self.write_stack(writing, path, param, group) if key != path else self.write_module(writing, group)
            ranks[key], alphas[key] = update.rank, update.alpha(config["use_rslora"])
        config["r"], config["rank_pattern"] = common(ranks)
        config["lora_alpha"], config["alpha_pattern"] = common({k: tidy(a) for k, a in alphas.items()})
        paths = [path for path, param in groups if (path, param) not in stacked]
        config["target_modules"] = writing.targets(paths)
        if stacked:
            config["target_parameters"] = sorted(f"{path}.{param}" for path, param in stacked)
        writing.adapted += paths
        writing.config |= config

    def write_module(self, writing: Writing, group: Sequence[Level]) -> layout.Update:
        """The tensors of one module, which several levels may act on (parts of a packed matrix, or one on another)."""
        site = group[0].site
        reason = MHA if isinstance(site.host, StoredHost) else layout.conv_differs(site.module)
        if reason:
            raise cannot(f"'{site.path}': {reason}")
        update = layout.together(group)
        names = ("lora_embedding_A", "lora_embedding_B") if site.is_embedding else ("lora_A.weight", "lora_B.weight")
        writing.tensors[f"{site.path}.{names[0]}"] = layout.kernel_like(update.A, site.module, spread=True)
        writing.tensors[f"{site.path}.{names[1]}"] = layout.kernel_like(update.B, site.module, spread=False)
        if update.bias is not None and not site.is_embedding:
            writing.tensors[f"{site.path}.lora_B.bias"] = update.bias
        if update.magnitude is not None:
            writing.tensors[f"{site.path}.lora_magnitude_vector"] = layout.vector_like(update.magnitude, site.module)
        return update

    def write_stack(self, writing: Writing, path: str, param: str, group: Sequence[Level]) -> layout.Update:
        """The tensors of one parameter; the parameters of a module are wrapped in the order the module holds them."""
        site = group[0].site
        names = [
            name for name in site.module._parameters
            if any(level.site.path == path and level.site.param == name for level in writing.adapter.levels
                   if self.takes(level.method))
        ]  # fmt: skip
        key = path + ".base_layer" * (len(names) - 1 - names.index(param))
        if site.expert is None:
            update = layout.together(group)
        else:
            by_expert = sorted(group, key=lambda level: level.site.expert or 0)
            if [level.site.expert for level in by_expert] != list(range(site.parameter.shape[0])):
                raise cannot(f"'{path}.{param}': PEFT adapts every expert of a stack, once")
            update = layout.join([layout.together([level]) for level in by_expert], f"{path}.{param}")
        writing.tensors[f"{key}.lora_A.weight"], writing.tensors[f"{key}.lora_B.weight"] = update.A, update.B
        return update


def unhooked(site: Site) -> bool:
    """Whether the site is a tensor that no module applies by itself, which PEFT reaches by `target_parameters`."""
    return site.expert is not None or (type(site.host) is StoredHost and site.param != "weight")
