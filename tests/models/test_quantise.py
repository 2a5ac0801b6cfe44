"""NF4 and affine storage: the numbers of their papers, bytes, and training, files and merging on such a base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2Model

import inlay
from inlay.core.affine import AffineLinear, Grid, packed, unpacked
from inlay.core.errors import OptionError, SiteError
from inlay.evaluate import evaluate
from inlay.evaluate.run import adapted
from inlay.models.quantise import KINDS, NF4Linear, quantiles, quantise, steps, stored_bytes
from inlay.recipe import Recipe
from inlay.shipping import write_merged
from inlay.train import train

# Dettmers et al. 2023, appendix E
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


# ---------------------------------------------------------------------- NormalFloat
def nf4_by_hand(W: Tensor) -> Tensor:
    """Blocks of 64 in rows' order: the nearest of 16 numbers, times the block's largest; no second quantisation."""
    code, flat = torch.tensor(NF4, dtype=torch.float64), W.detach().double().flatten()
    out = torch.empty_like(flat)
    for i in range(0, len(flat), 64):
        block = flat[i : i + 64]
        top = block.abs().max()
        out[i : i + 64] = code[(block[:, None] / top - code).abs().argmin(1)] * top
    return out.view_as(W)


def test_the_codebooks_are_the_papers() -> None:
    assert torch.equal(quantiles(torch.device("cpu")), torch.tensor(NF4))
    second = steps(torch.device("cpu"))
    assert len(second) == 256
    assert bool((second.diff() > 0).all())


@pytest.mark.parametrize(("d_in", "d_out"), [(128, 70), (96, 80), (70, 96), (288, 64), (33, 5)])
def test_nf4_by_hand(d_in: int, d_out: int) -> None:
    """Up to the second quantisation of the largest numbers, which moves a block by a few hundredths at most; also where
    blocks of 64 do not end with the rows."""
    torch.manual_seed(0)
    layer = nn.Linear(d_in, d_out)
    stored = NF4Linear(layer)
    W = layer.weight.detach()
    by_hand = nf4_by_hand(W)
    assert (stored.dequantize() - by_hand).abs().max() < 0.06 * W.abs().max()
    error = (stored.dequantize() - W).square().mean().sqrt() / W.square().mean().sqrt()
    assert error < 1.1 * (by_hand - W).square().mean().sqrt() / W.square().mean().sqrt()
    x = torch.randn(3, d_in)
    torch.testing.assert_close(stored(x), nn.functional.linear(x, stored.dequantize(), layer.bias))


def test_the_type_of_a_model_leaves_scales_alone() -> None:
    layer = NF4Linear(nn.Linear(64, 64))
    before = layer.dequantize()
    narrow = layer.to(torch.bfloat16)
    assert narrow.dequantize().dtype == torch.bfloat16
    assert torch.equal(narrow.dequantize(), before.to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_backward_needs_no_dense_copy(kind: str) -> None:
    """Gradients of the input are those of the dense layer with the same numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    quantise(model, kind)
    x = torch.randn(5, 64, requires_grad=True)
    (mine,) = torch.autograd.grad(model(x).square().sum(), x)
    W, b = model[0].dequantize(), model[0].bias
    (theirs,) = torch.autograd.grad(nn.functional.linear(x, W, b).square().sum(), x)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- affine
@settings(max_examples=30, deadline=None, derandomize=True)
@given(bits=st.integers(2, 8), d_out=st.integers(1, 5), per=st.integers(1, 7), groups=st.integers(1, 3))
def test_affine_grid(bits: int, d_out: int, per: int, groups: int) -> None:
    """Zero is a point, no number is more than half a step off, codes fit, and a fitted grid is never worse."""
    torch.manual_seed(bits * 100 + d_out * 10 + per)
    W = torch.randn(d_out, per * groups) + 0.3
    grid = Grid.of(W, bits, groups)
    codes = grid.codes(W)
    assert int(codes.max()) <= 2**bits - 1
    assert torch.equal(grid.values(grid.codes(torch.zeros_like(W))), torch.zeros_like(W))
    off = (grid.values(codes) - W).abs().unflatten(1, (groups, -1))
    assert bool((off <= grid.scale[..., None] * 1.001).all()), "a rounded zero point moves the ends by half a step"
    assert Grid.fitted(W, bits, groups).errors(W).sum() <= grid.errors(W).sum() * (1 + 1e-6)


def test_clipping_against_rounding() -> None:
    """Without clipping all error is rounding; a tight grid trades one for the other."""
    torch.manual_seed(0)
    W = torch.randn(4, 512)
    W[:, 0] = 20.0
    wide, tight = Grid.of(W, 4), Grid.of(W, 4, clip=0.5)
    (c0, r0), (c1, r1) = wide.split_error(W), tight.split_error(W)
    assert c0 == 0
    assert c1 > 0
    assert r1 < 0.5 * r0
    assert c0 + r0 == pytest.approx(float(wide.errors(W).sum()), rel=1e-5)
    assert c1 + r1 == pytest.approx(float(tight.errors(W).sum()), rel=1e-5)


@pytest.mark.parametrize("d_in", [6, 7])
def test_two_codes_to_a_byte(d_in: int) -> None:
    codes = torch.randint(16, (3, d_in), dtype=torch.uint8)
    assert packed(codes).shape == (3, (d_in + 1) // 2)
    assert torch.equal(unpacked(packed(codes), d_in), codes)
    layer = nn.Linear(d_in, 3)
    grid = Grid.fitted(layer.weight, 4)
    assert torch.equal(AffineLinear(layer, bits=4).dequantize(), grid.values(grid.codes(layer.weight)))


def test_refusals() -> None:
    with pytest.raises(OptionError, match="unknown quantisation 'nf3'"):
        quantise(nn.Sequential(nn.Linear(2, 2)), "nf3")
    with pytest.raises(SiteError, match="matches nothing"):
        quantise(nn.Sequential(nn.Conv1d(2, 2, 1)), "int8")
    with pytest.raises(SiteError, match=r"GPT2Model has no `nn.Linear`"):
        quantise(GPT2Model(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)), "int8")
    with pytest.raises(OptionError, match="groups of 64 always"):
        quantise(nn.Sequential(nn.Linear(2, 2)), "nf4", group=2)
    with pytest.raises(OptionError, match="2 to 8 bits"):
        Grid.of(torch.zeros(2, 2), 9)
    with pytest.raises(OptionError, match="do not divide"):
        Grid.of(torch.zeros(2, 7), 4, groups=2)


# ---------------------------------------------------------------------- a real model
@pytest.mark.parametrize(("kind", "limit"), [("nf4", 0.53), ("int8", 1.05), ("int4", 0.63)])
def test_bytes_per_number(kind: str, limit: float) -> None:
    opened = inlay.models.open("minilm", "text-classification", labels=["a", "b"], quantize=kind)
    size, numbers = stored_bytes(opened.model)
    assert numbers == 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 384 * 384, "all linear layers of the backbone"
    assert size / numbers <= limit
    assert type(opened.model.classifier) is nn.Linear


def test_qlora_end_to_end(tmp_path: Path) -> None:
    """Trained on NF4, opened again with the same numbers, written merged and dense with the same outputs."""
    folder = tmp_path / "adapter"
    recipe = Recipe(model="minilm", data="trec", method="lora(r=8)", where=["all-linear"], quantize="nf4", steps=40,
                    batch=16, limit={"train": 400, "validation": 60, "test": 120}, max_length=32, output=str(folder),
                    base_dropout=False)  # fmt: skip
    done = train(recipe)
    assert done.metrics["accuracy"] > 0.5
    assert done.curve[-1]["loss"] < done.curve[0]["loss"]
    again = evaluate(str(folder))
    assert again["accuracy"] == pytest.approx(done.metrics["accuracy"], abs=1e-6)
    found = adapted(folder)
    assert isinstance(found.opened.model.bert.encoder.layer[0].output.dense, NF4Linear)
    write_merged(found, tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "inlay_export.json").read_text())
    assert record["difference"] < 1e-5
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = torch.randint(1000, 2000, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, found.opened.model(ids).logits, rtol=1e-3, atol=1e-4)
    assert isinstance(found.opened.model.bert.encoder.layer[0].output.dense, NF4Linear), "the model stays as it was"
