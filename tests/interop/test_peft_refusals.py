"""Damaged folders, other bases and what inlay or PEFT cannot express: refused by name, the model left as it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_bases import BASES, Base, Convolutions, llama, vectors
from peft_checks import peft_folder, quiet
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay.core.errors import CheckpointError, InlayError, SiteError
from inlay.interop.peft import FAMILIES, read, support, write
from inlay.methods import (
    BOFT,
    IA3,
    OFT,
    SVFT,
    BitFit,
    DoRA,
    Full,
    GLoRA,
    KronA,
    LoHa,
    LoKr,
    LoRA,
    NormTuning,
    RoAd,
    VBLoRA,
    VeRA,
)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound LoRA folder for BERT."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
    peft_folder(BASES["bert"], config, tmp_path)
    return tmp_path


def edit(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder: Path, match: str, error: type[Exception] = CheckpointError, base: str = "bert") -> None:
    """Loading raises with that sentence and leaves no trace."""
    model = BASES[base]()
    keys = list(model.state_dict())
    with pytest.raises(error, match=match):
        inlay.load(model, folder)
    assert list(model.state_dict()) == keys
    assert "inlay" not in model._modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---------------------------------------------------------------------- damaged files
def test_truncated_tensors(folder: Path) -> None:
    whole = (folder / TENSORS).read_bytes()
    for length in (0, 7, 100, len(whole) - 5):
        (folder / TENSORS).write_bytes(whole[:length])
        refused(folder, "truncated or damaged")


def test_a_pickle_is_never_opened(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    refused(folder, r"pickle.*never opens.*save_pretrained")


def test_missing_files(folder: Path) -> None:
    (folder / TENSORS).unlink()
    refused(folder, "holds no adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="no such folder"):
        read(BASES["bert"](), folder / "nowhere")


def test_the_folder_above(folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "french"
    inner.mkdir()
    for name in (CONFIG, TENSORS):
        (folder / name).rename(inner / name)
    with pytest.raises(CheckpointError, match="french"):
        read(BASES["bert"](), tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"r"', ""])
def test_configuration_that_is_none(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    refused(folder, "is not JSON|is not a configuration")


@pytest.mark.parametrize("name", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_missing_field(folder: Path, name: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config[name]
    (folder / CONFIG).write_text(json.dumps(config))
    refused(folder, f"lacks the field '{name}'")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("r", "eight", "'r' must be int"),
        ("r", 0, "'r' must be at least 1"),
        ("r", 3, "has rank 4, the configuration says 3"),
        ("lora_dropout", 2.0, "'dropout' must be at most"),
        ("rank_pattern", {"query": 2}, "has rank 4, the configuration says 2"),
        ("bias", "some", "'bias' = 'some'"),
        ("bias", "lora_only", "lacks the tensor"),
        ("use_dora", True, "lora_magnitude_vector"),
        ("peft_type", "SHIRA", "peft_type 'SHIRA' cannot be read"),
        ("peft_type", "VERRA", "did you mean 'VERA'"),
        ("target_modules", ["query"], "does not account for"),
        ("target_modules", ["query", "value", "key"], "lacks the tensor.*key.lora_A"),
        ("modules_to_save", ["classifier", "pooler"], "lacks the tensor 'bert.pooler"),
        ("modules_to_save", None, "does not account for"),
        ("target_modules", "*query", "no regular expression"),
        ("brand_new", {"rho": 2}, "does not know the field 'brand_new'"),
    ],
)
def test_contradictions(folder: Path, field: str, value: object, match: str) -> None:
    edit(folder, **{field: value})
    refused(folder, match)


def test_targets_that_match_nothing(folder: Path) -> None:
    edit(folder, target_modules=["qeury"])
    refused(folder, "match nothing.*did you mean 'query'", SiteError)


def test_tensors_that_belong_nowhere(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    save_file({**tensors, "base_model.model.bert.nowhere.lora_A.weight": torch.ones(1)}, folder / TENSORS)
    refused(folder, "does not account for")


def test_missing_and_misshapen_tensors(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    name = f"{QUERY}.lora_B.weight"
    save_file({k: t for k, t in tensors.items() if k != name}, folder / TENSORS)
    refused(folder, "lacks the tensor")
    save_file(tensors | {name: torch.ones(17, 4)}, folder / TENSORS)
    refused(folder, r"\(17, 4\), this model needs \(16, 4\)")
    save_file(tensors | {name: torch.ones(4)}, folder / TENSORS)
    refused(folder, "a matrix is needed")


def test_experts_of_another_base(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    peft_folder(BASES["mixtral"], config, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    save_file({k: t[:4] if "lora_A" in k else t for k, t in tensors.items()}, tmp_path / TENSORS)
    refused(tmp_path, "none of 3 matrices", base="mixtral")


def test_another_base(folder: Path) -> None:
    refused(folder, "match nothing", SiteError, "llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft_folder(BASES["llama"], config, folder)
    options = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, intermediate_size=24
    )
    wide = transformers.LlamaForCausalLM(options)
    with pytest.raises(CheckpointError, match="wrong base"):
        read(wide, folder)


def test_a_refused_folder_keeps_the_active_adapter(folder: Path) -> None:
    model = BASES["bert"]()
    inlay.adapt(model, LoRA(r=2), name="mine")
    tensors = load_file(folder / TENSORS)
    save_file(tensors | {f"{QUERY}.lora_B.weight": torch.ones(17, 4)}, folder / TENSORS)
    with pytest.raises(CheckpointError, match="this model needs"):
        inlay.load(model, folder, name="theirs")
    assert model.inlay.active == ["mine"]
    assert list(model.inlay.adapters) == ["mine"]
    assert all(p.requires_grad for p in model.inlay.adapters["mine"].parameters())


def test_a_name_that_is_taken(folder: Path) -> None:
    model = BASES["bert"]()
    read(model, folder)
    with pytest.raises(inlay.core.errors.AdapterError, match="attached already"):
        read(model, folder)
    assert read(model, folder, "second").name == "second"


# ---------------------------------------------------------------------- what inlay cannot express
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("megatron_config", {"tp": 2}), ("trainable_token_indices", [1, 2]), ("layer_replication", [[0, 1], [0, 1]]),
        ("alora_invocation_tokens", [3]), ("arrow_config", {"top_k": 2}), ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}), ("kasa_config", {"beta": 0.1}), ("monteclora_config", {"num_samples": 2}),
        ("velora_config", {"num_groups": 2}), ("ensure_weight_tying", True),
    ],
)  # fmt: skip
def test_refused_fields(folder: Path, field: str, value: object) -> None:
    edit(folder, **{field: value})
    refused(folder, f"'{field}' = .* cannot be read: ")


QV = {"target_modules": ["query", "value"]}
TRAINING: dict[str, tuple[peft.PeftConfig, dict[str, Any], str]] = {
    "lokr-beyond": (
        peft.LoKrConfig(r=1, decompose_factor=8, target_modules=["intermediate.dense"]), {},
        "'decompose_factor' = 8 is beyond the root of its width",
    ),
    "oft-one-term": (peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=1, **QV), {}, "computes the identity"),
    "oft-two-terms": (peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=2, **QV), {}, r"computes I \+ 2S"),
    "oft-old": (peft.OFTConfig(oft_block_size=4, **QV), {"peft_version": "0.17.1"}, "before 0.18 the series"),
    "oft-unknown": (peft.OFTConfig(oft_block_size=4, **QV), {"peft_version": None}, "PEFT of unknown version"),
    "road-variant": (peft.RoadConfig(group_size=4, **QV), {"variant": "road_3"}, "RoAd: option 'variant'"),
    "glora-kind": (peft.GloraConfig(**QV), {"config_A_B": "tucker"}, "GLoRA: option 'A'"),
    "adalora-parameters": (
        peft.AdaLoraConfig(total_step=9, **QV), {"target_parameters": ["x"]}, "'target_parameters' = .* cannot be read",
    ),
    "adalora-ranks": (peft.AdaLoraConfig(total_step=9, **QV), {"init_r": 5}, "12 triplets, the configuration began"),
    "vblora-length": (
        peft.VBLoRAConfig(num_vectors=9, vector_length=8, **QV), {"vector_length": 5}, "do not divide all widths",
    ),
    "boft-shape": (peft.BOFTConfig(**QV), {"target_modules": ["query", "intermediate.dense"]}, "lacks the tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAINING)
def test_options_of_other_methods(case: str, tmp_path: Path) -> None:
    config, fields, match = TRAINING[case]
    peft_folder(BASES["bert"], config, tmp_path)
    edit(tmp_path, **fields)
    refused(tmp_path, match, InlayError)


PLACES: dict[str, tuple[str, peft.PeftConfig, str]] = {
    "loha-padding": ("padded", peft.LoHaConfig(target_modules=["conv"]), "padding_mode='reflect'"),
    "lokr-padding": ("padded", peft.LoKrConfig(target_modules=["conv"]), "padding_mode='reflect'"),
    "lokr-conv1d": ("conv", peft.LoKrConfig(r=8, target_modules=["one"]), "along the wrong axes"),
    "oft-kernel": ("pixels", peft.OFTConfig(oft_block_size=4, target_modules=["square"]), "overlapping patches"),
    "boft-padding": ("padded", peft.BOFTConfig(boft_block_size=3, target_modules=["conv"]), "of zeros"),
    "adalora-groups": (
        "pixels", peft.AdaLoraConfig(total_step=9, target_modules=["grouped"]), "without groups alone, this one has 2",
    ),
    "adalora-padding": ("padded", peft.AdaLoraConfig(total_step=9, target_modules=["conv"]), "padding_mode='reflect'"),
    "loha-attention": ("attention", peft.LoHaConfig(target_modules=["out_proj"]), "nn.Linear, Conv1d and Conv2d alone"),
    "beft-no-bias": ("llama", peft.BeftConfig(target_modules=["q_proj"]), "no linear layer with a bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_modules_that_peft_does_not_follow(case: str, tmp_path: Path) -> None:
    name, config, match = PLACES[case]
    base = Base(Padded, {"x": vectors(2, 3, 8, 8)}) if name == "padded" else BASES[name]
    with quiet():
        peft.get_peft_model(base(), config).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=match):
        read(base(), tmp_path)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_updates_relative_to_a_changed_base(folder: Path, init: str) -> None:
    edit(folder, init_lora_weights=init)
    refused(folder, "changed base.*path_initial_model_for_weight_conversion")


def test_pissa_is_read_once_converted(tmp_path: Path) -> None:
    """PEFT's own conversion makes PiSSA a LoRA of twice the rank, which computes the same on the unchanged base."""
    base = BASES["bert"]
    with quiet():
        model = peft.get_peft_model(base(), peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["query"]))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(tmp_path / "start"))
        model.peft_config["default"].init_lora_weights = "pissa"
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn_like(p)
        expected = base.output(model.eval())
        model.save_pretrained(str(tmp_path / "done"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain = base()
    adapter = inlay.load(plain, tmp_path / "done")
    assert adapter.placements[0].method.r == 4
    torch.testing.assert_close(base.output(plain), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"groups": 1, "padding": 1, "padding_mode": "circular"}, "padding_mode='circular'"),
        ({"dilation": (1, 1, 2)}, "dilation"),
    ],
)
def test_convolutions_that_peft_does_not_follow(options: dict, match: str, tmp_path: Path) -> None:
    base = Base(lambda: Convolutions(**options), {"x": vectors(2, 4, 24)})
    with quiet():
        peft.get_peft_model(base(), peft.LoraConfig(target_modules=["three"])).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=match):
        read(base(), tmp_path)
    with pytest.raises(CheckpointError, match=match):
        write(inlay.adapt(base(), LoRA(), ["three"]), tmp_path)


def test_grouped_convolutions(tmp_path: Path) -> None:
    base = Base(lambda: Grouped(), {"x": vectors(2, 4, 8)})
    with quiet():
        peft.get_peft_model(base(), peft.LoraConfig(target_modules=["conv"])).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="2 groups"):
        read(base(), tmp_path)
    with pytest.raises(CheckpointError, match="2 groups"):
        write(inlay.adapt(base(), LoRA(), ["conv"]), tmp_path)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_torch_attention(tmp_path: Path) -> None:
    base = BASES["attention"]
    with quiet():
        peft.get_peft_model(base(), peft.LoraConfig(target_modules=["attn"])).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="out_proj twice"):
        read(base(), tmp_path)


def test_lora_bias_without_a_bias_to_join(tmp_path: Path) -> None:
    peft_folder(BASES["llama"], peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), tmp_path)
    refused(tmp_path, "'lora_bias' cannot be read.*no bias", base="llama")
    tensors = load_file(tmp_path / TENSORS)
    save_file({k: torch.zeros_like(t) if "bias" in k else t for k, t in tensors.items()}, tmp_path / TENSORS)
    read(BASES["llama"](), tmp_path)  # a zero bias is none


def test_trained_running_statistics(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["embedder.normalization"])
    peft_folder(BASES["resnet"], config, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    name = next(k for k in tensors if k.endswith("running_mean"))
    save_file(tensors | {name: tensors[name] + 1}, tmp_path / TENSORS)
    refused(tmp_path, "running statistics", base="resnet")


def test_resized_vocabulary(tmp_path: Path) -> None:
    def larger() -> nn.Module:
        model = llama()()
        model.resize_token_embeddings(60, mean_resizing=False)
        return model

    with quiet():
        model = peft.get_peft_model(larger().eval(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    refused(tmp_path, r"60 rows.*50.*resize_token_embeddings\(60\)", base="llama")


def test_embeddings_saved_with_the_adapter(tmp_path: Path) -> None:
    """Base embeddings in the folder win over the model's, as in PEFT; tied output layers follow."""
    for name in ("llama", "llama-tied"):
        base = BASES[name]
        folder = tmp_path / name
        with quiet():
            model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
            model.get_input_embeddings().base_layer.weight.data += 0.1
            model.save_pretrained(str(folder))
            expected = base.output(model.eval())
        plain = base()
        before = base.output(plain)
        adapter = inlay.load(plain, folder)
        torch.testing.assert_close(base.output(plain), expected, atol=1e-5, rtol=1e-5)
        write(adapter, folder / "ours")
        with quiet():
            again = peft.PeftModel.from_pretrained(base(), str(folder / "ours"))
        torch.testing.assert_close(base.output(again), expected, atol=1e-5, rtol=1e-5)
        adapter.delete()
        assert torch.equal(base.output(plain), before)


# ---------------------------------------------------------------------- what PEFT cannot express
Make = Callable[[], inlay.Adapter]
CANNOT: dict[str, tuple[Make, str]] = {
    "full": (lambda: inlay.adapt(BASES["bert"](), Full()), "no method for Full"),
    "bitfit": (lambda: inlay.adapt(BASES["bert"](), BitFit(), head=None), "BEFT trains biases of nn.Linear alone"),
    "dora-lokr": (lambda: inlay.adapt(BASES["bert"](), DoRA(of=LoKr(r=1))), r"no counterpart of DoRA\(of=LoKr"),
    "two": (lambda: inlay.adapt(BASES["bert"](), [LoRA(), IA3()]), "one method per folder"),
    "some-biases": (lambda: inlay.adapt(BASES["bert"](), [LoRA().on("query"), BitFit(norms=False)]), "all biases"),
    "ia3-biases": (lambda: inlay.adapt(BASES["bert"](), [IA3(), BitFit()]), "trains no biases"),
    "some-tensors": (
        lambda: inlay.adapt(BASES["bert"](), [LoRA().on("query"), NormTuning()]), "one method per folder",
    ),
    "ranks": (
        lambda: inlay.adapt(BASES["bert"](), LoRA(), overrides={"block[0]": {"rank_stabilized": True}}),
        "one rank_stabilized",
    ),
    "dropout": (lambda: inlay.adapt(BASES["bert"](), LoRA(), overrides={"block[0]": {"dropout": 0.1}}), "one dropout"),
    "dora-some": (lambda: inlay.adapt(BASES["bert"](), [DoRA().on("query"), LoRA().on("key")]), "choice of DoRA"),
    "dora-bias": (lambda: inlay.adapt(BASES["bert"](), DoRA(of=LoRA(bias=True))), "no lora_bias with DoRA"),
    "experts-dropout": (
        lambda: inlay.adapt(BASES["mixtral"](), LoRA(dropout=0.1), ["experts.down_proj"]), "no DoRA, dropout or bias",
    ),
    "vera-packed": (lambda: inlay.adapt(BASES["gpt2"](), VeRA(r=2), ["attn.q"]), "packed matrix"),
    "vera-embedding": (lambda: inlay.adapt(BASES["llama"](), VeRA(r=2), ["embed"]), "linear layers alone"),
    "loha-dropout": (lambda: inlay.adapt(BASES["bert"](), LoHa(dropout=0.1)), "no dropout on its input"),
    "loha-packed": (lambda: inlay.adapt(BASES["gpt2"](), LoHa(r=2), ["attn.q"]), "packed matrix"),
    "loha-conv1d": (lambda: inlay.adapt(BASES["gpt2"](), LoHa(r=2), ["mlp.up"]), "nn.Linear, Conv1d and Conv2d alone"),
    "loha-conv3d": (lambda: inlay.adapt(BASES["conv"](), LoHa(r=2), ["three"]), "this is Conv3d"),
    "loha-padding": (lambda: inlay.adapt(Padded(), LoHa(r=2), ["conv"]), "padding_mode='reflect'"),
    "loha-embedding": (lambda: inlay.adapt(BASES["llama"](), LoHa(r=2), ["embed"]), "this is Embedding"),
    "loha-twice": (
        lambda: inlay.adapt(BASES["bert"](), [LoHa(r=2).on("query"), LoHa(r=3).on("query")]), "one LOHA per module",
    ),
    "lokr-conv1d": (lambda: inlay.adapt(BASES["conv"](), LoKr(r=8), ["one"]), "along the wrong axes"),
    "lokr-factors": (
        lambda: inlay.adapt(
            BASES["bert"](), LoKr(r=1), overrides={"block[0]": {"factor": 2}}
        ), "one decompose_factor, which cannot give first factors of 2 × 2, 4 × 4",
    ),
    "krona": (lambda: inlay.adapt(BASES["bert"](), KronA(rows=8, columns=2), ["attn.q"]), "first factors of 8 × 2"),
    "oft-kernel": (lambda: inlay.adapt(BASES["pixels"](), OFT(block_size=4), ["square"]), "overlapping patches"),
    "oft-terms": (
        lambda: inlay.adapt(BASES["bert"](), OFT(block_size=4, neumann=3), ["attn.q"]), "no form of 3 terms",
    ),
    "oft-sizes": (
        lambda: inlay.adapt(BASES["bert"](), OFT(block_size=4), overrides={"block[0].attn.q": {"block_size": 8}}),
        "blocks of one size",
    ),
    "boft-padding": (lambda: inlay.adapt(Padded(), BOFT(block_size=3, factors=1), ["conv"]), "of zeros"),
    "boft-groups": (lambda: inlay.adapt(BASES["pixels"](), BOFT(factors=1), ["grouped"]), "without groups alone"),
    "road-rest": (lambda: inlay.adapt(BASES["bert"](), RoAd(group=6), ["attn.q"]), "no whole groups of 6"),
    "road-conv": (lambda: inlay.adapt(BASES["pixels"](), RoAd(), ["square"]), "nn.Linear alone"),
    "vblora-banks": (
        lambda: inlay.adapt(
            BASES["bert"](), [VBLoRA(r=2, vectors=7).on("query"), VBLoRA(r=2, vectors=7).on("key")]
        ), "one bank of vectors",
    ),
    "glora-kinds": (lambda: inlay.adapt(BASES["bert"](), GLoRA(A="vector"), ["attn.q"]), "one kind for A and B"),
    "svft": (lambda: inlay.adapt(BASES["bert"](), SVFT(), ["attn.q"]), "no counterpart of SVFT"),
    "beft-out-proj": (
        lambda: inlay.adapt(BASES["attention"](), BitFit(), ["attn.out_proj"], head=None), "'attn.out_proj.bias'",
    ),
    "beft-in-proj": (lambda: inlay.adapt(BASES["attention"](), BitFit(), head=None), "'attn.in_proj_bias'"),
    "ia3-embedding": (lambda: inlay.adapt(BASES["llama"](), IA3(), ["embed"]), "IA3 on linear layers"),
    "inside-saved": (
        lambda: inlay.adapt(BASES["llama"](), [LoRA().on("block[0].attn.q"), Full().on("block[0]")]),
        "adapted inside a module that is trained as a whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT)
def test_what_peft_cannot_express(case: str, tmp_path: Path) -> None:
    make, match = CANNOT[case]
    with pytest.raises(CheckpointError, match=match):
        write(make(), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_merged_adapters_are_not_written(tmp_path: Path) -> None:
    adapter = inlay.adapt(BASES["bert"](), LoRA(), head=None)
    adapter.merge()
    with pytest.raises(CheckpointError, match="unmerge first"):
        write(adapter, tmp_path)


# ---------------------------------------------------------------------- the table
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_field_of_the_installed_peft_is_accounted_for(kind: str) -> None:
    theirs = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    known = {field.name: field for field in FAMILIES[kind].fields}
    for field in dataclasses.fields(theirs):
        assert field.name in known, f"PEFT's {kind} has a field that inlay does not know: {field.name}"
        default = field.default if field.default is not dataclasses.MISSING else None
        if known[field.name].use == "read" and not known[field.name].required and default is not None:
            assert known[field.name].default == default


def test_the_table_covers_every_family() -> None:
    rows = support()
    assert {row["peft_type"] for row in rows} == {*FAMILIES, "any other"}
    assert all(row["note"] for row in rows if row["use"] in ("refused", "no effect") or not row["field"])
    assert NormTuning.__name__ in next(r["note"] for r in rows if r["peft_type"] == "LN_TUNING" and not r["field"])
