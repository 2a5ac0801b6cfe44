"""Residual adapters on the real ResNet-50 and MobileNetV2: counts, places, the network's BatchNorms, merging."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from real_convolutions import network
from torch import Tensor, nn

import inlay
from inlay.core.errors import SiteError
from inlay.methods import NormTuning, ResidualParallel, ResidualSeries
from laws.cases import stir

FORMS = (ResidualSeries, ResidualParallel)


@pytest.fixture
def borrowed():
    """A network shared by tests, given back as it was."""
    lent: list[tuple[nn.Module, dict[str, bool]]] = []

    def borrow(name: str) -> nn.Module:
        model = network(name)
        lent.append((model, {n: p.requires_grad for n, p in model.named_parameters()}))
        return model

    yield borrow
    for model, flags in lent:
        if "inlay" in model._modules:
            inlay.detach(model)
        model.eval()
        for n, p in model.named_parameters():
            p.requires_grad_(flags[n])


def images(side: int = 48) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))


class Basic(nn.Module):
    """The convolutions of the papers' ResNet-26: a first one, then three stages of eight, of widths 64, 128 and 256."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 32, *(64,) * 8, *(128,) * 8, *(256,) * 8]
        made = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths)]
        self.convs = nn.ModuleList(made)


def test_counts() -> None:
    """One number for each pair of channels: a ninth of the 3×3 kernels in parallel, the outputs' squares in series."""
    model = Basic()
    kernels = sum(conv.weight.numel() for conv in model.convs)
    piece = inlay.adapt(model, ResidualParallel(), ["convs.*"], head=None)
    assert 9 * piece.adapter_parameters == kernels
    piece = inlay.adapt(Basic(), ResidualSeries(), ["convs.*"], head=None)
    assert piece.adapter_parameters == 32**2 + 8 * (64**2 + 128**2 + 256**2)


@pytest.mark.parametrize("form", FORMS)
def test_places(borrowed, form) -> None:
    """The 3×3 convolutions and the stem of ResNet-50; depthwise ones of MobileNetV2, with one number a channel."""
    piece = inlay.adapt(borrowed("resnet50"), form(), head=None)
    assert len(piece.levels) == 17
    blocks = 3 * 64**2 + 4 * 128**2 + 6 * 256**2 + 3 * 512**2
    assert piece.adapter_parameters == blocks + 64 * (3 if form is ResidualParallel else 64)
    piece = inlay.adapt(borrowed("mobilenetv2"), form(), exclude=["stem.conv"], head=None)
    assert len(piece.levels) == 16
    assert all(level.site.groups == level.site.d_out == level.method.A.numel() for level in piece.levels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2"])
def test_networks(borrowed, form, name) -> None:
    """Against hooks that add a 1×1 convolution, all BatchNorms untouched in training, merged and un-merged."""
    model, x = borrowed(name), images()
    with torch.no_grad():
        base = model(x).logits
    piece = inlay.adapt(model, form(pointwise=name == "mobilenetv2"), exclude=["stem.conv"], head=None)
    held = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("inlay.")}
    assert torch.equal(model.eval()(x).logits, base) or (model(x).logits - base).abs().max() < 1e-4
    stir(piece, by=0.02)
    adapted = model(x).logits.detach()
    assert (adapted - base).abs().max() > 1e-3

    model.train()
    optimizer = torch.optim.SGD(piece.parameters(), lr=0.0)
    model(x).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in piece.parameters())
    optimizer.step()
    model.eval()
    assert all(torch.equal(held[n], t) for n, t in model.state_dict().items() if n in held)  # statistics as well
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"inlay.{n}" for n, _ in model.inlay.named_parameters()
    }

    piece.merge()
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, adapted, atol=1e-3, rtol=1e-3)
    piece.unmerge()

    found = [(level.site.module, level.method.A.detach().clone()) for level in piece.levels]
    inlay.detach(model)
    handles = [conv.register_forward_hook(by_hand(A, form is ResidualParallel)) for conv, A in found]
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, adapted, atol=1e-3, rtol=1e-3)
    for handle in handles:
        handle.remove()


def by_hand(A: Tensor, parallel: bool):
    """A hook that adds the papers' 1×1 convolution."""

    def hook(conv: nn.Conv2d, args: tuple[Tensor], z: Tensor) -> Tensor:
        kernel = A[:, :, None, None]
        if not parallel:
            return z + F.conv2d(z, kernel, groups=conv.groups)
        skip = (conv.kernel_size[0] - 1) // 2 - conv.padding[0]  # where the network pads by itself, outside of the conv
        seen = args[0][:, :, skip:, skip:] if skip else args[0]
        out = F.conv2d(seen, kernel, stride=conv.stride, groups=conv.groups)
        return z + out[:, :, : z.shape[2], : z.shape[3]]

    return hook


@pytest.mark.parametrize("norms", ["affine", "domain"])
def test_batchnorms_of_the_adapter(borrowed, norms) -> None:
    """γ, β and, for a domain, running statistics are the adapter's own copies; the base's stay as they are."""
    model, x = borrowed("mobilenetv2"), images()
    piece = inlay.adapt(model, ResidualParallel(norms=norms), head=None)
    beside = [level.method for level in piece.levels if isinstance(level.method, NormTuning)]
    assert sum(p.numel() for method in beside for p in method.parameters()) == sum(
        p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m._parameters.values()
    )
    held = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("inlay.")}
    model.train()
    model(x).logits.square().sum().backward()
    moved = [m for m in beside if "running_mean" in m.states() and m.states()["num_batches_tracked"] > 0]
    assert bool(moved) == (norms == "domain")
    assert all(torch.equal(held[n], t) for n, t in model.eval().state_dict().items() if n in held)


def test_places_of_the_users_own_leave_the_norms_to_the_user(borrowed) -> None:
    model = borrowed("resnet50")
    with pytest.raises(SiteError, match="brings NormTuning with it, each to its own places"):
        inlay.adapt(model, ResidualSeries(norms="domain"), ["conv"])
    inlay.adapt(model, [ResidualSeries().on("block[0].conv"), NormTuning(statistics="adapted").on("block[0]")])
