"""Merging on quantised bases: rounded again with the error told, written in few bits, opened again; PEQA's scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import inlay
import inlay.models
from inlay.cli import main
from inlay.core.affine import AffineLinear
from inlay.core.errors import ComposeError, MergeError, SiteError
from inlay.evaluate.run import Adapted
from inlay.methods import PEQA, DoRA, LoRA, VeRA
from inlay.models.fewbits import RECORD
from inlay.models.quantise import NF4Linear, quantise, stored_bytes
from inlay.models.rounding import Rounding, rounding
from inlay.shipping import write_few_bits
from laws.benches import benches
from laws.cases import model_of, stir
from laws.checks import output, same_tensors, tensors

METHODS = {"peqa": PEQA().on(""), "dora": DoRA().on("up")}


# ---------------------------------------------------------------------- rounding a merge again
@pytest.mark.parametrize("bench", ["nf4", "int4"])
@pytest.mark.parametrize("method", ["lora(r=3)", "dora(of=lora(r=3))", "vera(r=6)", "oft(block_size=4)"])
def test_requantised_merge(bench: str, method: str) -> None:
    """As few bits as before; the error is that of the new numbers; un-merging puts the very same layers back."""
    model, inputs = model_of(benches()[bench]), benches()[bench].feed()
    adapter = inlay.adapt(model, method, ["up", "down"])
    stir(adapter)
    before, layers, adapted = tensors(model), (model.up, model.down), output(model, inputs)
    kind, wanted = type(model.up).__name__, {}
    for level in adapter.levels:
        wanted[level.site.path] = level.method.weight(level.site.weight).detach()
    merged = adapter.merge(requantise=True)
    assert type(model.up).__name__ == kind
    assert [t.shape for n, t in tensors(model).items()] == [t.shape for t in before.values()]
    assert set(merged.rounding) == {"up", "down"}
    for path, W in wanted.items():
        error = float((model.get_submodule(path).dequantize() - W).norm() / W.norm())
        assert merged.rounding[path] == pytest.approx(error, rel=1e-3)
        assert 0.01 < error < 0.2
    assert merged.worst == max(merged.rounding.values())
    assert merged.mean == pytest.approx(sum(merged.rounding.values()) / 2)
    assert merged.difference < 1e-5
    off = (output(model, inputs) - adapted).norm() / adapted.norm()
    assert 1e-4 < off < 0.2
    adapter.unmerge()
    assert (model.up, model.down) == layers
    same_tensors(before, tensors(model), "un-merging")
    assert torch.equal(adapted, output(model, inputs))


def test_a_merge_that_is_exact_says_so() -> None:
    """Dense layers are not rounded; neither are those whose scales alone have changed."""
    model = model_of(benches()["linear"])
    adapter = inlay.adapt(model, LoRA(r=2), "up")
    assert adapter.merge(requantise=True).rounding == {}
    model = model_of(benches()["int4"])
    peqa = inlay.adapt(model, PEQA())
    stir(peqa, by=0.01)
    adapted, codes = output(model, benches()["int4"].feed()), model.up.get_buffer("codes")
    merged = peqa.merge()
    assert (merged.rounding, merged.worst, merged.mean) == ({}, 0.0, 0.0)
    assert isinstance(model.up, AffineLinear)
    assert model.up.get_buffer("codes") is codes
    assert torch.equal(adapted, output(model, benches()["int4"].feed()))


def test_foreign_storage_cannot_be_written() -> None:
    model = model_of(benches()["int8-module"])
    adapter = inlay.adapt(model, LoRA(r=2), ["up"])
    with pytest.raises(MergeError, match=r"'up' \(Int8Linear\) can be read but not written"):
        adapter.merge(requantise=True)
    with pytest.raises(MergeError, match="requantise=True, which rounds"):
        adapter.merge()


# ---------------------------------------------------------------------- PEQA
@pytest.mark.parametrize("base", ["linear", "nf4", "int8-module"])
def test_peqa_needs_a_grid(base: str) -> None:
    model = model_of(benches()[base])
    with pytest.raises(SiteError, match="it needs a base held in few bits, such as quantize='int4'"):
        inlay.adapt(model, PEQA())
    assert "inlay" not in model._modules


def test_switching_tasks_swaps_scales_alone(tmp_path: Path) -> None:
    """Two tasks on one model: the integers and zero points are the same tensors, a file holds scales alone."""
    model, inputs = model_of(benches()["int8"]), benches()["int8"].feed()
    held = dict(model.named_buffers())
    found = {}
    for seed, name in enumerate("ab"):
        adapter = inlay.adapt(model, PEQA(), name=name)
        stir(adapter, seed, by=0.02)
        found[name] = output(model, inputs)
        adapter.save(str(tmp_path / name))
        assert {n: tuple(p.shape) for n, p in adapter.levels[0].method.named_parameters()} == {"value": (12, 1)}
    for name in "aba":
        inlay.use(model, name)
        assert torch.equal(output(model, inputs), found[name])
    inside = {n: b for n, b in model.named_buffers() if not n.startswith("inlay.")}
    assert all(held[n] is b for n, b in inside.items())
    fresh = model_of(benches()["int8"])
    inlay.load(fresh, tmp_path / "b")
    assert torch.equal(output(fresh, inputs), found["b"])


def test_peqa_with_others_at_one_layer(tmp_path: Path) -> None:
    """Scales below, an update on top: as one adapter, merged and saved; what reads W is refused."""
    model, inputs = model_of(benches()["int4"]), benches()["int4"].feed()
    adapter = inlay.adapt(model, [PEQA(), LoRA(r=2).on("up", "down")])
    stir(adapter, by=0.02)
    both = output(model, inputs)
    adapter.merge(dequantise=True)
    torch.testing.assert_close(output(model, inputs), both, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(output(model, inputs), both)
    adapter.save(str(tmp_path))
    fresh = model_of(benches()["int4"])
    inlay.load(fresh, tmp_path)
    assert torch.equal(output(fresh, inputs), both)
    for order in (["peqa", "dora"], ["dora", "peqa"]):
        with pytest.raises(ComposeError, match="reads"):
            inlay.adapt(model_of(benches()["int4"]), [METHODS[name] for name in order])


def test_a_groups_scale_at_a_time() -> None:
    opened = inlay.models.open("minilm", "text-classification", num_labels=2, quantize="int8", quantize_group=128)
    adapter = inlay.adapt(opened.model, PEQA())
    assert adapter.adapter_parameters == (6 * (4 * 384 * 384 + 2 * 384 * 1536) + 384 * 384) // 128
    assert 22e6 < adapter.base_parameters < 23e6, "a quantised matrix counts as what it stands for"


# ---------------------------------------------------------------------- folders of few bits
def test_written_in_few_bits_and_opened_again(tmp_path: Path) -> None:
    """QLoRA of VeRA: the folder opens to the merged model's own bits, is an eighth of the size, and trains on."""
    opened = inlay.models.open("minilm", "text-classification", num_labels=3, quantize="nf4")
    model = opened.model
    adapter = inlay.adapt(model, VeRA(r=64), ["attn.q", "mlp.down"])
    stir(adapter, by=0.05)
    ids = torch.randint(1000, 2000, (2, 9))
    record = write_few_bits(Adapted(opened, adapter, {}), tmp_path / "few")
    assert len(record["rounding"]) == 12
    assert 0 < record["rounding_mean"] <= record["rounding_worst"] < 0.2
    adapter.merge(requantise=True)
    again = inlay.models.open(tmp_path / "few", "text-classification", num_labels=3)
    assert isinstance(again.model.bert.encoder.layer[0].output.dense, NF4Linear)
    assert again.head == []
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, model(ids).logits)
    size, numbers = stored_bytes(again.model)
    assert size / numbers <= 0.53
    inlay.adapt(again.model, LoRA(r=2), "attn.q", head=None)
    again.model(ids).logits.sum().backward()


def test_what_cannot_be_written_in_few_bits(tmp_path: Path) -> None:
    opened = inlay.models.open("minilm", "text-classification", num_labels=3)
    adapter = inlay.adapt(opened.model, LoRA(r=2))
    with pytest.raises(MergeError, match="no layer of the base is stored in few bits"):
        write_few_bits(Adapted(opened, adapter, {}), tmp_path / "few")
    assert not (tmp_path / "few").exists()
    assert not opened.model.inlay.state.merged_names


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`merge --requantise` of a saved adapter, and what `inspect` shows of a model to be quantised."""
    opened = inlay.models.open("minilm", "features", quantize="int4")
    adapter = inlay.adapt(opened.model, LoRA(r=2), ["attn.q"], layers=[0])
    stir(adapter, by=0.05)
    recipe = {"quantize": "int4"}
    adapter.save(str(tmp_path / "a"), model="minilm", task="features", recipe=recipe)
    assert main(["merge", str(tmp_path / "a"), "--output", str(tmp_path / "m"), "--requantise", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record["rounding"]) == ["encoder.layer.0.attention.self.query"]
    assert 0 < record["rounding_worst"] < 0.2
    assert (tmp_path / "m" / RECORD).exists()
    assert main(["inspect", "minilm", "--quantize", "int4", "--quantize-group", "128", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)
    assert len(layers) == 37
    assert all(layer["used"][0] > layer["widest"][0] == 0 for layer in layers), "clipped where that is better"
    assert all(sum(layer["used"]) < sum(layer["widest"]) for layer in layers)
    assert main(["inspect", "minilm", "--quantize-group", "64"]) == 2
    assert "say how the model would be stored" in capsys.readouterr().err


def test_errors_of_a_layer_by_hand() -> None:
    """Clipping and rounding add up to the squared error of what is stored; the total weighs layers by ‖W‖²."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    model[1].weight.data *= 3
    W = [layer.weight.detach().clone() for layer in model]
    for kind in ("int4", "nf4"):
        found = rounding(model, kind)
        stored = nn.Sequential(*[nn.Linear(64, 32), nn.Linear(32, 64)])
        stored.load_state_dict(model.state_dict())
        quantise(stored, kind)
        lost = [float((m.dequantize() - w).square().sum()) for m, w in zip(stored, W, strict=True)]
        for layer, error, w in zip(found, lost, W, strict=True):
            assert sum(layer.used) == pytest.approx(error / float(w.square().sum()), rel=1e-4)
        whole = sum(lost) / sum(float(w.square().sum()) for w in W)
        assert Rounding.total(found).relative == pytest.approx(whole**0.5, rel=1e-4)
    assert all(type(layer) is nn.Linear for layer in model), "the model stays as it is"
