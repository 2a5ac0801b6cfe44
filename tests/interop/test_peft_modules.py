"""LoHa, LoKr, OFT, BOFT, RoAd, VB-LoRA, AdaLoRA, GLoRA and BEFT folders, read and written, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from peft_bases import BASES, Base
from peft_checks import adapted_here, both_ways, close, perturb, quiet
from safetensors.torch import load_file

import inlay
from inlay.interop.peft import write
from inlay.methods import (
    BOFT,
    OFT,
    AdaLoRA,
    BitFit,
    DeltaLoRA,
    DoRA,
    DyLoRA,
    Full,
    GLoRA,
    KronA,
    LoHa,
    LoKr,
    LoRA,
    ReLoRA,
    RoAd,
    VBLoRA,
    VeRA,
)

QV = {"target_modules": ["query", "value"]}
CASES = {
    # ------------------------------------------------------------------ LoHa and LoKr
    "loha": ("bert", peft.LoHaConfig, {"r": 3, "alpha": 5, **QV, "task_type": "SEQ_CLS"}),
    "loha-patterns": (
        "llama", peft.LoHaConfig,
        {"target_modules": "all-linear", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    ),
    "loha-rests": ("bert", peft.LoHaConfig, {"r": 2, "rank_dropout": 0.2, "module_dropout": 0.1, **QV}),
    "lokr-rests": ("bert", peft.LoKrConfig, {"r": 2, "rank_dropout": 0.2, "rank_dropout_scale": True, **QV}),
    "loha-layers": ("llama", peft.LoHaConfig, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "loha-conv": ("conv", peft.LoHaConfig, {"r": 2, "target_modules": ["one", "two", "point", "out"]}),
    "loha-tucker": (
        "conv", peft.LoHaConfig, {"r": 2, "target_modules": ["one", "two", "point"], "use_effective_conv2d": True},
    ),
    "loha-groups": ("pixels", peft.LoHaConfig, {"r": 2, "target_modules": ["grouped", "square"]}),
    "lokr": ("bert", peft.LoKrConfig, {"r": 1, "alpha": 2, **QV, "task_type": "SEQ_CLS"}),
    "lokr-full": ("llama", peft.LoKrConfig, {"r": 8, "target_modules": "all-linear", "init_weights": "lycoris"}),
    "lokr-both": (
        "llama", peft.LoKrConfig,
        {"r": 1, "target_modules": "all-linear", "decompose_both": True, "rank_pattern": {"v_proj": 2}},
    ),
    "lokr-factor": ("llama", peft.LoKrConfig, {"r": 1, "target_modules": ["up_proj", "o_proj"], "decompose_factor": 2}),
    "lokr-beyond": (  # 8 divides 24 and 16, and is the larger part of the latter
        "llama", peft.LoKrConfig, {"r": 8, "alpha": 3, "target_modules": "all-linear", "decompose_factor": 8},
    ),
    "lokr-conv": ("conv", peft.LoKrConfig, {"r": 1, "target_modules": ["two", "point", "out"]}),
    "lokr-conv1d": ("conv", peft.LoKrConfig, {"r": 1, "target_modules": ["one"], "decompose_factor": 1}),
    "lokr-tucker": (
        "pixels", peft.LoKrConfig,
        {"r": 1, "target_modules": ["square", "point", "grouped"], "use_effective_conv2d": True, "decompose_factor": 1},
    ),
    # ------------------------------------------------------------------ rotations
    "oft": ("bert", peft.OFTConfig, {"oft_block_size": 4, "use_cayley_neumann": False, **QV, "task_type": "SEQ_CLS"}),
    "oft-neumann": ("llama", peft.OFTConfig, {"oft_block_size": 4, "target_modules": ["q_proj", "down_proj"]}),
    "oft-neumann-3": ("bert", peft.OFTConfig, {"oft_block_size": 4, "num_cayley_neumann_terms": 3, **QV}),
    "oft-neumann-4": ("bert", peft.OFTConfig, {"oft_block_size": 4, "num_cayley_neumann_terms": 4, **QV}),
    "oft-number": (
        "llama", peft.OFTConfig, {"r": 2, "oft_block_size": 0, "target_modules": "all-linear", "module_dropout": 0.1},
    ),
    "oft-adjusted": ("llama", peft.OFTConfig, {"oft_block_size": 5, "target_modules": ["q_proj", "k_proj"]}),
    "oft-constrained": ("bert", peft.OFTConfig, {"oft_block_size": 8, "coft": True, "eps": 0.5, **QV}),
    "oft-shared": ("bert", peft.OFTConfig, {"oft_block_size": 4, "block_share": True, **QV, "bias": "oft_only"}),
    "oft-embedding": ("gemma", peft.OFTConfig, {"oft_block_size": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "oft-pixels": (
        "pixels", peft.OFTConfig, {"oft_block_size": 4, "target_modules": ["point"], "use_cayley_neumann": False},
    ),
    # ------------------------------------------------------------------ the others
    "road-1": ("bert", peft.RoadConfig, {"group_size": 4, **QV, "task_type": "SEQ_CLS"}),
    "road-2": ("llama", peft.RoadConfig, {"variant": "road_2", "group_size": 8, "target_modules": "all-linear"}),
    "road-4": ("bert", peft.RoadConfig, {"variant": "road_4", "group_size": 8, **QV}),
    "vblora": (
        "bert", peft.VBLoRAConfig, {"r": 2, "num_vectors": 9, "vector_length": 8, **QV, "task_type": "SEQ_CLS"},
    ),
    "vblora-top": (
        "gpt2", peft.VBLoRAConfig,
        {"num_vectors": 300, "vector_length": 4, "topk": 3, "target_modules": ["c_attn", "c_fc"], "vblora_dropout": 0.1,
         "fan_in_fan_out": True, "bias": "vblora_only"},
    ),
    "adalora": (
        "bert", peft.AdaLoraConfig,
        {"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 50, "tinit": 5, "tfinal": 10, **QV,
         "task_type": "SEQ_CLS"},
    ),
    "adalora-gpt2": (
        "gpt2", peft.AdaLoraConfig,
        {"total_step": 9, "target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_dropout": 0.1, "bias": "all"},
    ),
    "adalora-conv": ("conv", peft.AdaLoraConfig, {"total_step": 9, "init_r": 9, "target_modules": ["two", "out"]}),
    **{
        f"glora-{weight}-{coupling}-{bias}": (
            "bert", peft.GloraConfig,
            {"r": 2, "config_A_B": weight, "config_C": coupling, "config_D_E": bias, **QV, "task_type": "SEQ_CLS"},
        )
        for weight, coupling, bias in (
            ("lora", "lora", "constant"), ("vector", "vector", "vector"), ("constant", "none", "none"),
            ("none", "lora", "vector"),
        )
    },
    "glora-llama": ("llama", peft.GloraConfig, {"target_modules": ["q_proj", "down_proj"]}),
    "glora-bias": ("llama-biased", peft.GloraConfig, {"target_modules": ["q_proj"], "bias": "glora_only"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_theirs(case: str, tmp_path: Path) -> None:
    name, config, options = CASES[case]
    with quiet():
        given = config(**options)
    both_ways(BASES[name], given, tmp_path)


NOT_ALL_COUNTS = {
    # b×b numbers of a block of which the skew-symmetric half acts
    "boft": ("bert", peft.BOFTConfig, {"boft_block_size": 4, **QV, "task_type": "SEQ_CLS"}),
    "boft-number": (
        "llama", peft.BOFTConfig, {"boft_block_size": 0, "boft_block_num": 2, "target_modules": "all-linear"},
    ),
    "boft-bias": ("bert", peft.BOFTConfig, {"boft_block_size": 8, "boft_dropout": 0.1, **QV, "bias": "boft_only"}),
    "boft-conv": ("pixels", peft.BOFTConfig, {"boft_block_size": 4, "target_modules": ["square", "point"]}),
    # an offset beside the bias it is added to
    "beft": ("bert", peft.BeftConfig, {"target_modules": ["value", "output.dense"], "task_type": "SEQ_CLS"}),
    # K − 1 weights in the place of logits
    "vblora-compact": (
        "bert", peft.VBLoRAConfig,
        {"r": 2, "num_vectors": 9, "vector_length": 8, "topk": 3, "save_only_topk_weights": True, **QV},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_ALL_COUNTS)
def test_theirs_but_for_numbers_without_effect(case: str, tmp_path: Path) -> None:
    name, config, options = NOT_ALL_COUNTS[case]
    with quiet():
        given = config(**options)
    both_ways(BASES[name], given, tmp_path, same=False)


class Blocks:
    """What PEFT's CUDA extension computes: block-diagonal matrices from stacks of blocks."""

    def forward(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.mark.parametrize(("name", "target"), [("llama", ["q_proj", "gate_proj"]), ("pixels", ["point"])])
def test_butterflies(name: str, target: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one factor, with the extension's product in its place."""
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", Blocks)
    config = peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3, target_modules=target)
    adapter = both_ways(BASES[name], config, tmp_path, same=False)
    assert adapter.levels[0].method.factors == 3


def test_adalora_with_pruned_triplets(tmp_path: Path) -> None:
    """A budget really spent by PEFT: the folder holds survivors alone, of some modules none."""
    base = BASES["bert"]
    with quiet():
        config = peft.AdaLoraConfig(init_r=3, target_r=1, total_step=8, tinit=1, tfinal=2, **QV, task_type="SEQ_CLS")
        model = peft.get_peft_model(base(), config)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
        for step in range(8):
            loss = model(**base.call, labels=torch.tensor([0, 1, 2])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
        model.save_pretrained(str(tmp_path / "theirs"))
        expected = base.output(model.eval())
    plain = base()
    adapter = inlay.load(plain, tmp_path / "theirs")
    close(base.output(plain), expected)
    ranks = {t.shape[0] for k, t in load_file(tmp_path / "theirs" / "adapter_model.safetensors").items() if "_E" in k}
    assert {0, 1} <= ranks
    mine = [level.method for level in adapter.levels if isinstance(level.method, AdaLoRA)]
    assert {method.r for method in mine} == {max(r, 1) for r in ranks}
    write(adapter, tmp_path / "ours")
    close(loaded_by_peft(base, tmp_path / "ours"), expected)


def loaded_by_peft(base: Base, folder: Path) -> torch.Tensor:
    """PEFT's output; it cannot put tensors into an AdaLoRA twice, which `peft_output` does."""
    with quiet():
        return base.output(peft.PeftModel.from_pretrained(base(), str(folder)).eval())


OURS = {
    "loha": ("bert", LoHa(r=2, alpha=3, rank_stabilized=True), ["attn.q", "mlp.up"], {}),
    "loha-conv": ("conv", LoHa(r=2, tucker=True), ["one", "two"], {}),
    "lokr": ("llama", LoKr(r=1), ["attn.q", "mlp.down"], {}),
    "lokr-overrides": ("llama", LoKr(r=1, factor=2), ["attn.q", "mlp.up"], {"overrides": {"mlp.up": {"r": 2}}}),
    "lokr-factor": ("bert", LoKr(r=1, factor=8), ["attn.q"], {}),  # 2 × 8: PEFT's 8 would be 8 × 2
    "lokr-conv": ("pixels", LoKr(r=1, factor=2), ["square", "point"], {}),
    "krona": ("bert", KronA(rows=4, columns=4, scale=2), ["attn.q", "mlp.up"], {}),
    "krona-large": ("bert", KronA(rows=8, columns=8, scale=3), ["attn.q"], {}),
    "oft": ("bert", OFT(block_size=4), ["attn.q", "mlp.up"], {}),
    "oft-neumann": ("llama", OFT(block_size=8, neumann=6), ["embed", "attn.q"], {}),
    "oft-shared": ("llama", OFT(block_size=4, shared=True, constrained=True, epsilon=0.3), ["mlp.down"], {}),
    "boft": ("bert", BOFT(block_size=4, factors=1), ["attn.q", "mlp.down"], {}),
    "boft-plain": ("pixels", BOFT(block_size=4, factors=1, scale=False), ["square"], {}),
    "road": ("bert", RoAd(), ["attn.q", "mlp.up"], {}),
    "road-4": ("llama", RoAd(variant=4, group=4), ["attn.q", "mlp.up"], {}),
    "vblora": ("llama", VBLoRA(r=2, vectors=7), ["attn.q", "mlp.up"], {}),
    "vblora-compact": ("bert", VBLoRA(r=2, vectors=7, compact=True), ["attn.q"], {}),
    "vblora-conv": ("conv", VBLoRA(r=2, vectors=7), ["one"], {}),
    "vblora-packed": ("gpt2", VBLoRA(r=2, vectors=7), ["attn.q", "attn.v"], {}),
    "vblora-dora": ("bert", DoRA(of=VBLoRA(r=2, vectors=7)), ["attn.q"], {}),
    "adalora": ("bert", AdaLoRA(r=3, target=2), ["attn.q", "attn.v"], {}),
    "adalora-packed": ("gpt2", AdaLoRA(r=3, target=2), ["attn.q", "mlp.up"], {}),
    "adalora-embedding": ("llama", AdaLoRA(r=3, target=2), ["embed", "attn.q"], {}),
    "glora": ("bert", GLoRA(r=2), ["attn.q", "mlp.up"], {}),
    "glora-plain": ("llama", GLoRA(r=2, A="none", B="none"), ["attn.q"], {}),
    "bitfit": ("bert", BitFit(norms=False), ["attn.q", "mlp"], {}),
    "dvora": ("bert", DoRA(of=VeRA(r=6)), ["attn.q", "mlp.up"], {}),
    "dylora": ("bert", DyLoRA(of=LoRA(r=3, bias=True), rank=2), ["attn.q"], {}),
    "deltalora": ("bert", DeltaLoRA(of=LoRA(r=3)), ["attn.q"], {}),
    "relora": ("llama", ReLoRA(of=LoRA(r=2), restarts=2), ["attn.q"], {}),
    "relora-vera": ("gpt2", ReLoRA(of=VeRA(r=3), restarts=2), ["attn.q", "attn.v"], {}),
    "loha-norms": ("bert", [LoHa(r=2).on("query"), Full().on("LayerNorm")], None, {"head": None}),
    "oft-biases": ("bert", [OFT(block_size=4).on("query"), BitFit()], None, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_ours_in_peft(case: str, tmp_path: Path) -> None:
    adapted_here(*OURS[case], tmp_path)


def test_dylora_is_written_whole_while_it_trains(tmp_path: Path) -> None:
    """In training a rank is drawn for each step; the folder holds all of them."""
    base = BASES["bert"]
    adapter = inlay.adapt(base(), DyLoRA(of=LoRA(r=4)), ["attn.q"], head=None)
    perturb(adapter.model)
    write(adapter, tmp_path / "eval")
    adapter.model.train()
    write(adapter, tmp_path / "train")
    assert adapter.levels[0].method.training
    one, other = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("eval", "train"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_peft_folder_of_a_pruned_adapter(tmp_path: Path) -> None:
    """Triplets that inlay's budget removed are not in the folder."""
    base = BASES["bert"]
    adapter = inlay.adapt(base(), AdaLoRA(r=4, target=1), ["attn.q", "attn.v"], head=None)
    perturb(adapter.model)
    for level, alive in zip(adapter.levels, (1, 4, 2, 3), strict=True):
        method = level.method
        assert isinstance(method, AdaLoRA)
        method.kept = [i < alive for i in range(4)]
        with torch.no_grad():
            method.E.mul_(torch.tensor(method.kept))
    expected = base.output(adapter.model)
    write(adapter, tmp_path / "ours")
    close(loaded_by_peft(base, tmp_path / "ours"), expected)
    again = base()
    loaded = inlay.load(again, tmp_path / "ours")
    assert [level.method.r for level in loaded.levels] == [1, 4, 2, 3]
    close(base.output(again), expected)
