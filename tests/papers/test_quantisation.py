"""Quantised bases against their papers and against PEFT: LoftQ, PEQA, and the bits of NF4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import inlay
import inlay.models
from inlay.core.affine import AffineLinear, Grid
from inlay.methods import LoRA
from inlay.models.loftq import alternate
from inlay.models.quantise import NF4Linear, quantised
from inlay.plan import plan


# ---------------------------------------------------------------------- LoftQ
class OnCPU(TorchFunctionMode):
    """What PEFT sends to a GPU stays where it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to:
            args, kwargs = tuple(map(here, args)), {name: here(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def here(value: Any) -> Any:
    return "cpu" if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value


class Single(nn.Module):
    """NF4 without the second quantisation, which PEFT's LoftQ leaves out."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        import bitsandbytes.functional as bits

        self.in_features, self.out_features = of.in_features, of.out_features
        codes, state = bits.quantize_4bit(of.weight.detach().contiguous(), compress_statistics=False, quant_type="nf4")
        self.register_buffer("W", bits.dequantize_4bit(codes, state))

    def dequantize(self) -> Tensor:
        return self.get_buffer("W")


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_pefts(iterations: int) -> None:
    """The same Q and the same B A as PEFT after as many iterations, where both quantise alike."""
    from peft.utils.loftq_utils import loftq_init

    torch.manual_seed(0)
    layer, r = of(torch.randn(80, 3) @ torch.randn(3, 128) + 0.3 * torch.randn(80, 128)), 6
    with OnCPU():
        Q, A, B = loftq_init(layer.weight.detach().clone(), num_bits=4, reduced_rank=r, num_iter=iterations)
    adapter = inlay.adapt(nn.Sequential(layer), LoRA(r=r, alpha=float(r)), "0")
    (level,) = adapter.levels
    inlay.detach(adapter.model)
    found = alternate(layer, [level.site], [r], Single, iterations)
    assert len(found.errors) == iterations + 1
    ((U, S, V),) = found.triplets
    torch.testing.assert_close(found.layer.dequantize(), Q, rtol=0, atol=1e-6)
    torch.testing.assert_close((U * S) @ V.T, B @ A, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "r"), [("nf4", 8), ("int4", 8), ("nf4", 16)])
def test_loftq_lowers_the_error_at_every_iteration(kind: str, r: int) -> None:
    """Li et al., figure 3's claim on real weights: below quantisation alone from the first iteration, then lower."""
    model = inlay.models.open("minilm", "features").model
    adapter = inlay.adapt(model, LoRA(r=r), ["attn.q", "mlp.down"], layers=[0, 5])
    before = {lv.site.path: lv.site.weight.clone() for lv in adapter.levels}
    errors = inlay.loftq(adapter, kind, iterations=5)
    for level in adapter.levels:
        path, W = level.site.path, before[level.site.path]
        assert len(errors[path]) == 6
        assert all(a > b for a, b in zip(errors[path], errors[path][1:], strict=False))
        assert errors[path][0] == pytest.approx(
            float((W - quantised(of(W), kind).dequantize()).norm() / W.norm()), rel=1e-4
        )
        left = W - level.site.weight - level.method.delta().dense().detach()
        assert float(left.norm() / W.norm()) == pytest.approx(errors[path][-1], rel=1e-3)
    others = [path for path in errors if path not in before]
    assert others
    assert all(len(errors[path]) == 1 for path in others), "layers without an update are rounded"


def of(W: Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0])
    layer.weight = nn.Parameter(W)
    return layer


# ---------------------------------------------------------------------- PEQA
def test_peqa_counts_of_the_paper() -> None:
    """LLaMA-7B with one scale per output channel: 32 · 42,496 numbers (the paper's 1.36 million)."""
    found = plan("llama-7b", "peqa", quantize="int4", quantize_group=1 << 20, memory=False)
    assert found.adapter_parameters == 32 * 42_496 == 1_359_872
    grouped = plan("llama-7b", "peqa", quantize="int4", quantize_group=256, memory=False)
    assert grouped.adapter_parameters == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) // 256


def test_peqa_by_hand() -> None:
    """(s₀ + Δs)(W̄ − z) with W̄ = clamp(⌊W/s₀⌉ + z, 0, 2ᵇ − 1), and ∂L/∂s through that."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 5), torch.randn(7, 12)
    model = nn.Sequential(AffineLinear(layer, bits=4, groups=3))
    s0, z = model[0].scale.detach().double(), model[0].get_buffer("zero").double()
    grid = Grid.fitted(layer.weight, 4, 3)
    assert torch.equal(s0.float(), grid.scale)
    W = layer.weight.detach().double().reshape(5, 3, 4)
    integers = ((W / s0[..., None]).round() + z[..., None]).clamp(0, 15)
    adapter = inlay.adapt(model, "peqa")
    (s,) = adapter.parameters()
    with torch.no_grad():
        s += 0.1 * torch.randn_like(s) * s
    by_hand = s.detach().double().requires_grad_()
    dense = (by_hand[..., None] * (integers - z[..., None])).reshape(5, 12)
    expected = x.double() @ dense.T + layer.bias.double()
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-6)
    (mine,) = torch.autograd.grad(model(x).square().sum(), s)
    (theirs,) = torch.autograd.grad(expected.square().sum(), by_hand)
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- QLoRA
def test_bits_of_a_number_in_nf4() -> None:
    """Dettmers et al., section 3: scales of 8 bits per 64 numbers and 32 bits per 256 of those, 0.127 bits a number."""
    layer = NF4Linear(nn.Linear(1024, 1024, bias=False))
    codes = layer.get_buffer("codes").nbytes
    assert 8 * codes / 1024**2 == 4
    scales = sum(layer.get_buffer(name).nbytes for name in ("largest", "scale"))
    assert 8 * scales / 1024**2 == pytest.approx(8 / 64 + 32 / (64 * 256), abs=1e-6)
