"""Every weight method on the real convolutions of ResNet-50 and MobileNetV2: the dense kernel, merging, gradients.

Strides, 1×1, 3×3 and 7×7 kernels, groups of one channel, and the variants of `real_convolutions.py`. Which methods may
refuse which layers is stated here; all others must act on all.
"""

from __future__ import annotations

import pytest
import torch
from real_convolutions import convolved, layers_of, network
from torch import Tensor, nn

import inlay
from inlay.core.errors import SiteError
from inlay.core.method import Method, WeightMethod
from inlay.methods import SSF, BitFit, DoRA, Full, LoKr, LoRA, NormTuning, RoAd
from laws.cases import methods, stir
from laws.oracles import ORACLES, given

NETWORKS = ("resnet50", "mobilenetv2")
GROUPED = {("mobilenetv2", "depthwise"), ("mobilenetv2", "stride")}
REFUSALS: dict[str, tuple[set[tuple[str, str]], str]] = {
    "BOFT(block_size=2": (
        {("resnet50", "stem"), ("mobilenetv2", "stem"), *GROUPED},
        r"has (147|27|9) features to rotate, which cannot be cut into a multiple of 2 blocks of even size",
    ),
    "ETHER(blocks=2, side='output')": (GROUPED, r"features in (32|96) groups, which leaves no two of them to mix"),
    "ETHERPlus": (GROUPED, r"features in (32|96) groups, which leaves no two of them to mix"),
    "ETHERPlus(blocks=2, side='input')": (set(), ""),
    "SCT": ({*GROUPED, ("resnet50", "grouped")}, r"would mix the outputs of different groups of 'layers\.\w+'"),
    "RoAd": (GROUPED, r"RoAd would mix the outputs of different groups of 'layers\.\w+', which see different channels"),
}
"""Beginning of a method's label (the longest that fits counts): layers, reason."""


def refusal(method: Method) -> tuple[set[tuple[str, str]], str]:
    fitting = [text for text in REFUSALS if method.label().startswith(text)]
    return REFUSALS[max(fitting, key=len)] if fitting else (set(), "")


def every() -> list[object]:
    """Each weight method in each of its settings; beyond the first they are for the long suite."""
    found, seen = [], set[type]()
    for method in methods():
        if isinstance(method, WeightMethod) and not method.architecture:
            marks = [pytest.mark.slow] if type(method) in seen else []
            found.append(pytest.param(method, id=method.label(), marks=marks))
            seen.add(type(method))
    return found


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", every())
def test_layers(method: WeightMethod, name: str) -> None:
    model = layers_of(name).eval()
    refused, reason = refusal(method)
    places = [key for key in model.layers if (name, key) not in refused]
    for _, key in sorted(refused & {(name, key) for key in model.layers}):
        with pytest.raises(SiteError, match=reason):
            inlay.adapt(model, method, [f"layers.{key}"])
    base = model()
    adapter = inlay.adapt(model, method, [f"layers.{key}" for key in places])
    if method.starts_at_base:
        compare(model(), base, 1e-5)
    stir(adapter)

    adapted = model()
    expected = {level.site.path.split(".")[1]: by_hand(model, level.method) for level in adapter.levels}
    assert set(expected) == set(places)
    compare({key: adapted[key] for key in places}, expected, 1e-4)
    moved = [key for key in places if (adapted[key] - base[key]).abs().max() > 1e-4 * base[key].abs().max()]
    assert moved == places

    loss = torch.stack([y.square().mean() for y in adapted.values()]).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in adapter.parameters())

    adapter.merge()
    compare(model(), adapted, 1e-5)
    adapter.unmerge()
    assert all(torch.equal(y, adapted[key]) for key, y in model().items())


def by_hand(model: nn.Module, method: Method) -> Tensor:
    """One layer's output with the kernel of the method's equation, in float64."""
    site = method.site
    shared = {name: site.shared_now(name) for name in site.uses}
    bias = None if site.bias is None else site.bias.detach().double()
    W, b = ORACLES[method.name()](site.weight.double(), bias, given(method, shared))
    return convolved(site.module, model.inputs[site.path.split(".")[1]], W, b)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for key, y in expected.items():
        error = (found[key].double() - y.double()).abs().max() / y.abs().max()
        assert error <= tolerance, f"{key}: relative difference {error:.1e}"


# ---------------------------------------------------------------------- whole networks
CONVOLUTIONS = "type:Conv2d"
WHOLE = {
    "LoRA": [LoRA(r=4).on(CONVOLUTIONS)], "DoRA of LoKr": [DoRA(of=LoKr(r=2)).on(CONVOLUTIONS)], "SSF": [SSF().on("")],
    "norms": [NormTuning()], "biases": [BitFit()], "full": [Full()],
    "LoRA and norms": [LoRA(r=2).on(CONVOLUTIONS), NormTuning()],
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("case", WHOLE)
def test_networks(case: str, name: str) -> None:
    """On every convolution, every normalisation, or all tensors: identity, gradients, and the merged network."""
    model = network(name)
    x = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        with torch.no_grad():
            base = model(x).logits
        adapter = inlay.adapt(model, WHOLE[case])
        with torch.no_grad():
            torch.testing.assert_close(model(x).logits, base, atol=1e-4, rtol=1e-4)
        stir(adapter, by=0.02)
        adapted = model(x).logits
        assert (adapted - base).abs().max() > 1e-3
        adapted.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
        adapter.merge()
        with torch.no_grad():
            torch.testing.assert_close(model(x).logits, adapted.detach(), atol=1e-3, rtol=1e-3)
    finally:
        inlay.detach(model)
        for n, p in model.named_parameters():
            p.requires_grad_(flags[n])
    with torch.no_grad():
        assert torch.equal(model(x).logits, base)


def test_road_refuses_the_depthwise_half_of_mobilenet() -> None:
    model = network("mobilenetv2")
    with pytest.raises(SiteError, match=r"RoAd would mix the outputs of different groups of '.*conv_3x3\.convolution'"):
        inlay.adapt(model, RoAd(), ["type:Conv2d"])
    assert inlay.adapt(model, RoAd(), ["expand_1x1.convolution", "reduce_1x1.convolution"]).adapter_parameters > 0
    inlay.detach(model)
