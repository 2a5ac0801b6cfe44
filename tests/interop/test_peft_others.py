"""VeRA, IA3 and norm-tuning folders of PEFT, read and written, with PEFT as the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.vera.model import _kaiming_init
from peft_bases import BASES
from peft_checks import both_ways, close, from_inlay, peft_folder, peft_output, quiet
from safetensors.torch import load_file, save_file

import inlay
from inlay.core.errors import CheckpointError
from inlay.interop.peft import read, write
from inlay.methods import IA3, BitFit, Full, NormTuning, VeRA
from inlay.methods.weight.vera import projections

VERA = {
    "bert": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "shapes": ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "vera_dropout": 0.1}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "seed": ("llama", {"target_modules": ["q_proj", "o_proj"], "projection_prng_key": 7, "d_initial": 0.5}),
    "bias": ("bert", {"target_modules": ["query", "output.dense"], "bias": "vera_only"}),
    "bias-all": ("bert", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0]}),
    "drawn": ("bert", {"target_modules": ["query", "intermediate.dense"], "save_projection": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", VERA)
def test_vera(case: str, tmp_path: Path) -> None:
    name, options = VERA[case]
    with quiet():
        config = peft.VeraConfig(**{"r": 5, **options})
    adapter = both_ways(BASES[name], config, tmp_path)
    assert adapter.placements[0].method.projections == ""  # the very numbers PEFT drew


@pytest.mark.parametrize(("seed", "r", "wide", "tall"), [(0, 256, 768, 768), (3, 16, 100, 37), (7, 64, 515, 1376)])
def test_vera_draws_what_peft_draws(seed: int, r: int, wide: int, tall: int) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    theirs = [_kaiming_init(shape, generator=generator) for shape in ((r, wide), (tall, r))]
    assert all(torch.equal(a, b) for a, b in zip(theirs, projections(seed, r, wide, tall), strict=True))


def test_vera_keeps_foreign_projections(tmp_path: Path) -> None:
    """Projections that no seed draws (a bfloat16 base rounds them) stay with the adapter, through every file."""
    base = BASES["bert"]
    with quiet():
        peft_folder(base, peft.VeraConfig(r=4, target_modules=["query", "intermediate.dense"]), tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in ("base_model.vera_A", "base_model.vera_B"):
        tensors[name] = tensors[name].bfloat16()
    save_file(tensors, path)
    expected = peft_output(base, tmp_path / "theirs")

    model = base()
    adapter = inlay.load(model, tmp_path / "theirs")
    close(base.output(model), expected)
    drawn = inlay.adapt(model, VeRA(r=4), ["query", "intermediate.dense"], name="drawn", head=None)
    assert set(adapter.levels[0].site.uses).isdisjoint(drawn.levels[0].site.uses)
    inlay.use(model, "default")
    close(base.output(model), expected)
    adapter.save(str(tmp_path / "own"))
    write(adapter, tmp_path / "ours")
    close(peft_output(base, tmp_path / "ours"), expected)
    for folder in ("own", "ours"):
        again = base()
        inlay.load(again, tmp_path / folder)
        assert torch.equal(base.output(again), base.output(model))


def test_vera_projections_that_contradict_the_configuration(tmp_path: Path) -> None:
    with quiet():
        peft_folder(BASES["bert"], peft.VeraConfig(r=4, target_modules=["query"]), tmp_path)
    config = tmp_path / "adapter_config.json"
    changed = {"projection_prng_key": 9, "save_projection": False}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(CheckpointError, match="save_projection"):
        read(BASES["bert"](), tmp_path)


IA3S = {
    "bert": ("bert", {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}),
    "head": ("roberta", {"target_modules": ["key"], "feedforward_modules": [], "task_type": "SEQ_CLS"}),
    "regex": (
        "llama", {"target_modules": r".*\.(k_proj|down_proj)", "feedforward_modules": r".*1\.mlp\.down_proj"},
    ),
    "default": ("gpt2", {"fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "conv": ("conv", {"target_modules": ["two", "point", "three", "out"], "feedforward_modules": ["out"]}),
    "exclude": (
        "llama", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"],
                  "exclude_modules": ["layers.0.self_attn.k_proj"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IA3S)
def test_ia3(case: str, tmp_path: Path) -> None:
    name, options = IA3S[case]
    both_ways(BASES[name], peft.IA3Config(**options), tmp_path)


NORMS = {
    "bert": ("bert", {"target_modules": ["LayerNorm"], "task_type": "SEQ_CLS"}),
    "llama": ("llama", {"task_type": "CAUSAL_LM"}),
    "batchnorm": ("resnet", {"target_modules": ["normalization"], "modules_to_save": ["classifier"]}),
}


@pytest.mark.parametrize("case", NORMS)
def test_norms(case: str, tmp_path: Path) -> None:
    name, options = NORMS[case]
    both_ways(BASES[name], peft.LNTuningConfig(**options), tmp_path)


def test_running_statistics_that_training_moved(tmp_path: Path) -> None:
    """PEFT trains a copy of a BatchNorm with its statistics: read as adapted ones, written as they are."""
    base = BASES["resnet"]
    config = peft.LNTuningConfig(target_modules=["normalization"], modules_to_save=["classifier"])
    with quiet():
        theirs = peft.get_peft_model(base(), config)
        theirs.train()
        theirs(**base.call)
        theirs.save_pretrained(str(tmp_path / "theirs"))
        expected = base.output(theirs.eval())
    model = base()
    untouched = base.output(model)
    assert not torch.allclose(expected, untouched, atol=1e-3)
    adapter = inlay.load(model, tmp_path / "theirs")
    assert adapter.levels[0].method.statistics == "adapted"
    close(base.output(model), expected)
    write(adapter, tmp_path / "ours")
    close(peft_output(base, tmp_path / "ours"), expected)
    with inlay.disabled(model):
        assert torch.equal(base.output(model), untouched)


def test_other_modules_than_norms_are_read_as_full(tmp_path: Path) -> None:
    base = BASES["bert"]
    expected, _ = peft_folder(base, peft.LNTuningConfig(target_modules=["pooler.dense"]), tmp_path)
    model = base()
    assert isinstance(read(model, tmp_path).levels[0].method, Full)
    close(base.output(model), expected)


OURS = {
    "vera": ("llama", VeRA(r=6), ["attn.q", "mlp.down"], {}),
    "vera-gpt2": ("gpt2", VeRA(r=6, seed=3), ["mlp.up", "mlp.down"], {}),
    "vera-biases": ("bert", [VeRA(r=4).on("attn.q"), BitFit().on("attn.q")], None, {}),
    "ia3": ("bert", IA3(), None, {}),
    "ia3-llama": ("llama", IA3(), None, {}),
    "ia3-packed": ("gpt2", IA3(), None, {}),
    "norms": ("bert", NormTuning(), None, {}),
    "norms-llama": ("llama", NormTuning(), None, {}),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_in_peft(case: str, tmp_path: Path) -> None:
    name, methods, where, options = OURS[case]
    base = BASES[name]
    from_inlay(base, inlay.adapt(base(), methods, where, **options), tmp_path)
