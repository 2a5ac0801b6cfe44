"""Visual prompting, VPT and prompt generation networks: the numbers in their papers and in the authors' code."""

from __future__ import annotations

import pytest
import torch

from inlay.methods.tokens.generator import ResNet10
from inlay.plan import plan


@pytest.mark.parametrize(
    ("arch", "method", "length", "count"),
    [
        ("vit-base", "visualprompt", 224, 69_840),  # 2·3·30·(224 + 224 − 60), Bahng et al.
        ("vit-base", "visualprompt(shape='fixed', size=50)", 224, 7_500),
        ("vit-base", "visualprompt(shape='random', size=30)", 224, 2_700),
        ("resnet50", "visualprompt(size=30)", 224, 69_840),
        ("dinov2-small", "visualprompt", 224, 69_840),
        ("dinov2-small", "visualprompt", 70, 2 * 3 * 9 * (140 - 18)),  # the frame in proportion: 30·70/224
        ("vit-base", "vpt(tokens=50, deep=false)", 224, 38_400),  # Jia et al., p·d
        ("vit-base", "vpt(tokens=50)", 224, 460_800),  # L·p·d
        ("vit-base", "vpt(tokens=50, width=64)", 224, 12 * 50 * 64 + 768 * 64 + 768),
        ("vit-base", "pgn", 224, 196_608 + 528_384 + 307_312),  # token library, head and convolutions of g
        ("dinov2-small", "pgn(tokens=8, library=64)", 70, 64 * 384 + 129 * 8 * 64 + 307_312),
    ],
)
def test_counts(arch: str, method: str, length: int, count: int) -> None:
    found = plan(arch, method, length=length, memory=False)
    assert found.adapter_parameters == count
    assert found.sites == 1


def test_the_released_generator_is_as_large() -> None:
    """About 1.04 million parameters, 4.15 MB in float32."""
    found = plan("vit-base", "pgn", memory=False)
    assert found.adapter_parameters == pytest.approx(1.04e6, rel=0.01)
    assert found.adapter_bytes == pytest.approx(4.15e6, rel=0.01)


def test_generator_is_as_written_in_the_paper() -> None:
    """Halved by the stem, by pooling and by three of four blocks: 224 pixels come to 7."""
    g = ResNet10(3, 10).eval()
    seen: list[tuple[int, ...]] = []
    for block in g.blocks:
        block.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape[1:])))
    with torch.no_grad():
        assert g(torch.zeros(1, 3, 224, 224)).shape == (1, 10)
    assert seen == [(16, 56, 56), (32, 28, 28), (64, 14, 14), (128, 7, 7)]
    assert sum(p.numel() for p in g.parameters()) == ResNet10.count(3, 10) == 307_312 + 1_290


def test_vpt_begins_within_the_bound_of_the_patch_embedding() -> None:
    """U(−v, v) with v = √(6 / (3·P² + d)): ViT-B/16 gives 0.0625."""
    import transformers

    import inlay
    from inlay.methods import VPT

    config = transformers.ViTConfig(num_hidden_layers=2)
    with torch.device("meta"):
        model = transformers.ViTModel(config)
    assert (6 / (3 * 16**2 + 768)) ** 0.5 == 0.0625
    P = inlay.adapt(model.to_empty(device="cpu"), VPT(tokens=50), head=None).levels[0].method.P.detach()
    assert 0.0615 < float(P.abs().max()) <= 0.0625
    assert float(P.std()) == pytest.approx(0.0625 / 3**0.5, rel=0.02)
