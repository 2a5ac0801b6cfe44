"""LoftQ beyond its equation: methods, files, places, recipes and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.errors import AdapterError, CheckpointError, OptionError
from inlay.evaluate import evaluate
from inlay.evaluate.run import adapted
from inlay.methods import LoRA
from inlay.models.quantise import NF4Linear, quantise
from inlay.plan import plan
from inlay.recipe import Recipe, load_recipe
from inlay.train import train
from laws.benches import benches
from laws.cases import model_of, stir


class Net(nn.Module):
    """Two layers that are adapted, one that is not, with weights that a low rank can help."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 5)
        for layer in (self.up, self.down):
            layer.weight.data += 3 * torch.outer(torch.randn(layer.out_features), torch.randn(layer.in_features)) / 64

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.down(torch.tanh(self.up(x))))


def net() -> nn.Module:
    torch.manual_seed(3)
    return Net().eval()


X = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
WHERE = ["up", "down"]
METHODS = [
    "lora(r=4, alpha=12)", "lorafa(r=4, corrected=true)", "adalora(r=4, target=4)", "dora(of=lora(r=4))",
    "dylora(of=lora(r=4))", "relora(of=lora(r=4))", "deltalora(of=lora(r=4))", "dora(of=adalora(r=4, target=4))",
]  # fmt: skip


def off(model: nn.Module) -> float:
    with torch.no_grad():
        expected = net()(X)
        return float((model(X) - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_every_low_rank_method_begins_nearer_to_the_base(method: str, tmp_path: Path) -> None:
    """Nearer than the rounded base is, saved and loaded with the same bits, and trained like any other adapter."""
    rounded, model = net(), net()
    quantise(rounded, "nf4")
    adapter = inlay.adapt(model, method, WHERE)
    errors = inlay.loftq(adapter, "nf4", iterations=4)
    assert set(errors) == {"up", "down", "out"}
    assert off(model) < 0.8 * off(rounded)
    for path in WHERE:
        W, level = net().get_submodule(path).weight, next(lv for lv in adapter.levels if lv.site.path == path)
        with torch.no_grad():
            near = float((level.method.weight(level.site.weight) - W).norm() / W.norm())
        assert near < 1.05 * errors[path][-1] if "dora" in method else near == pytest.approx(errors[path][-1], rel=1e-3)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.005)
    goal, losses = net()(X).detach() + 0.3, []
    model.train()
    for k in range(8):
        loss = (model(X) - goal).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        inlay.step(model, (k + 1) / 8, optimizer)
        optimizer.zero_grad()
    assert min(losses[1:]) < losses[0], losses
    model.eval()
    adapter.save(str(tmp_path))
    again = net()
    assert inlay.loftq_base(again, tmp_path) == ["up", "down", "out"]
    inlay.load(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(X), model(X))
    resaved = tmp_path / "again"
    inlay.save(inlay.load(opened(tmp_path), tmp_path), resaved)
    assert inlay.loftq_base(net(), resaved) == ["up", "down", "out"]


def opened(folder: Path) -> nn.Module:
    model = net()
    inlay.loftq_base(model, folder)
    return model


def test_one_iteration_stands_on_the_rounded_base(tmp_path: Path) -> None:
    """Nothing was subtracted before quantising: the file has no tensors of the base, the base is that of `quantise`."""
    adapter = inlay.adapt(net(), LoRA(r=4), WHERE)
    inlay.loftq(adapter, "nf4", iterations=1)
    adapter.save(str(tmp_path))
    rounded = net()
    quantise(rounded, "nf4")
    inlay.load(rounded, tmp_path)
    with torch.no_grad():
        assert torch.equal(rounded(X), adapter.model(X))


def test_merged_and_unmerged() -> None:
    model = net()
    adapter = inlay.adapt(model, "dora(of=lora(r=4))", WHERE)
    inlay.loftq(adapter, "int4", 2, group=32)
    stir(adapter)
    with torch.no_grad():
        before = model(X)
        adapter.merge(dequantise=True)
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)
        adapter.unmerge()
        assert torch.equal(model(X), before)


def test_parts_of_one_matrix() -> None:
    """Queries and values of one packed layer take their own rows of what is lost; the keys are only rounded."""
    bench = benches()["timm"]
    model, W = model_of(bench), model_of(bench).blocks[0].attn.qkv.weight.detach()
    adapter = inlay.adapt(model, LoRA(r=2), ["attn.q", "attn.v"])
    errors = inlay.loftq(adapter, "int4", iterations=3)
    layer = model.blocks[0].attn.qkv
    lost = W - layer.dequantize()
    for level in adapter.levels:
        if level.site.module is layer:
            rows = level.site.matrix_of(lost)
            assert (rows - level.method.delta().dense()).norm() < 0.9 * rows.norm()
    assert errors["blocks.0.attn.qkv"][-1] < errors["blocks.0.attn.qkv"][0]


def test_on_a_base_in_bfloat16(tmp_path: Path) -> None:
    model = net().bfloat16()
    adapter = inlay.adapt(model, LoRA(r=4), WHERE)
    errors = inlay.loftq(adapter, "nf4", 3)
    assert errors["up"][-1] < errors["up"][0]
    adapter.save(str(tmp_path))
    again = net().bfloat16()
    inlay.loftq_base(again, tmp_path)
    inlay.load(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(X.bfloat16()), model(X.bfloat16()))


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "method", ["vera(r=8)", "lokr(r=1)", "loraxs(r=2)", "pissa(r=2)", "bitfit", "oft(block_size=4)"]
)
def test_methods_without_factors_to_set(method: str) -> None:
    model = net()
    adapter = inlay.adapt(model, method, WHERE)
    before = model(X)
    with pytest.raises(OptionError, match="has none to be set"):
        inlay.loftq(adapter)
    assert torch.equal(model(X), before), "a refused call changed something"
    assert type(model.out) is nn.Linear


def test_refusals(tmp_path: Path) -> None:
    adapter = inlay.adapt(net(), LoRA(r=2), WHERE)
    with pytest.raises(OptionError, match="unknown quantisation 'nf3'"):
        inlay.loftq(adapter, "nf3")
    with pytest.raises(OptionError, match="at least 1 iteration"):
        inlay.loftq(adapter, "int4", 0)
    inlay.adapt(adapter.model, LoRA(r=2), WHERE, name="b")
    with pytest.raises(AdapterError, match="only one attached"):
        inlay.loftq(adapter)
    inlay.delete(adapter.model, "b")
    inlay.loftq(adapter, "int4", 2)
    with pytest.raises(AdapterError, match="quantised already"):
        inlay.loftq(adapter, "int4")
    adapter.save(str(tmp_path))
    rounded = net()
    quantise(rounded, "int4")
    for base in (net(), rounded):
        with pytest.raises(CheckpointError, match=r"inlay\.loftq_base\(model, folder\)"):
            inlay.load(base, tmp_path)
    with pytest.raises(CheckpointError, match="in full"):
        inlay.loftq_base(rounded, tmp_path)
    with pytest.raises(CheckpointError, match="quantised for it by LoftQ"):
        inlay.export_peft(adapter, tmp_path / "peft")
    plain = inlay.adapt(net(), LoRA(r=2), WHERE)
    plain.save(str(tmp_path / "plain"))
    assert inlay.loftq_base(plain.model, tmp_path / "plain") == []


def test_recipes() -> None:
    common = {"model": "minilm", "data": "trec", "method": "lora"}
    with pytest.raises(OptionError, match="quantize: nf4"):
        load_recipe({**common, "loftq": 5}, Recipe)
    with pytest.raises(OptionError, match="quantize_group is for an affine base"):
        load_recipe({**common, "quantize": "nf4", "quantize_group": 64}, Recipe)


def test_a_recipe_from_training_to_evaluation(tmp_path: Path) -> None:
    """Trained, found finished, opened again by its folder: the same numbers, on a base made for the adapter."""
    folder = tmp_path / "adapter"
    recipe = Recipe(model="minilm", data="trec", method="lora(r=8)", where=["attn.q", "mlp.down"], quantize="nf4",
                    loftq=2, steps=15, batch=16, limit={"train": 240, "validation": 30, "test": 60}, max_length=24,
                    output=str(folder), base_dropout=False)  # fmt: skip
    done = train(recipe)
    assert done.curve[-1]["loss"] < done.curve[0]["loss"]
    assert json.loads((folder / "adapter.json").read_text())["base"]["loftq"]["iterations"] == 2
    foreseen = plan("minilm", "lora(r=8)", recipe.where, labels=6, quantize="nf4", loftq=2, memory=False)
    assert foreseen.file_bytes == pytest.approx(done.file_bytes, rel=0.01)
    assert train(recipe).metrics == done.metrics
    assert evaluate(str(folder)) == pytest.approx(done.metrics, abs=1e-6)
    assert isinstance(adapted(folder).opened.model.bert.encoder.layer[0].output.dense, NF4Linear)
