"""SCT: the paper's count, and which channels a calibration chooses, against norms taken here."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

import inlay
from inlay.methods import SCT
from inlay.plan import plan


def vit(**sizes) -> nn.Module:
    torch.manual_seed(3)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3, num_labels=3, **sizes,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 0]])
    return [{"pixel_values": torch.randn(4, 3, 8, 8, generator=generator), "labels": row} for row in labels]


def test_count_of_the_paper() -> None:
    assert plan("vit-base", "sct(channels=96)", memory=False).adapter_parameters == 111_744


@pytest.mark.parametrize("where", [["mlp.down"], ["attn.q", "attn.v"]])
def test_salient_channels(where: list[str]) -> None:
    """L2 norms over the samples and tokens of each class, their mean over the classes, the largest K."""
    model = vit()
    piece = inlay.adapt(model, SCT(channels=5), where)
    seen: dict[str, list[Tensor]] = {}
    with inlay.disabled(model):
        handles = [
            level.site.module.register_forward_hook(
                lambda m, a, y, key=level.site.key: seen.setdefault(key, []).append(y.detach())
            )
            for level in piece.levels
            if not level.head
        ]
        for batch in batches():
            model(**batch)
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        base = model(**batches()[0]).logits
    found = inlay.calibrate(model, batches())
    assert found.places == len(seen)
    labels = torch.cat([batch["labels"] for batch in batches()])
    for level in piece.levels:
        if level.head:
            continue
        y = torch.cat(seen[level.site.key])
        norms = torch.stack([y[labels == c].reshape(-1, 16).square().sum(0).sqrt() for c in range(3)]).mean(0)
        assert set(level.method.S.tolist()) == set(norms.argsort(descending=True)[:5].tolist())
        assert level.method.is_calibrated
    with torch.no_grad():
        assert torch.equal(model(**batches()[0]).logits, base)  # still the base


def test_other_channels_stay_as_they_are() -> None:
    model = vit()
    method = inlay.adapt(model, SCT(channels=5), head=None).levels[0].method
    with torch.no_grad():
        method.W.normal_()
        method.b.normal_()
        y = torch.randn(2, 7, 16)
        moved = (method.after(y, y) - y).abs().amax((0, 1)) > 0
    assert moved.nonzero().flatten().tolist() == method.S.tolist()


def test_tokens_without_labels_are_one_class_and_padding_is_left_out() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40,
        initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids, mask = torch.randint(1, 40, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[0, 3:] = 0
    method = inlay.adapt(model, SCT(channels=4), head=None).levels[0].method
    seen: list[Tensor] = []
    handle = method.site.module.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    inlay.calibrate(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}])
    handle.remove()
    norms = seen[0][mask.bool()].square().sum(0)
    assert set(method.S.tolist()) == set(norms.argsort(descending=True)[:4].tolist())
    assert int(method.samples) == 15


def test_channels_are_loaded_with_the_adapter(tmp_path) -> None:
    model = vit()
    piece = inlay.adapt(model, SCT(channels=5))
    inlay.calibrate(model, batches())
    with torch.no_grad():
        for p in piece.parameters():
            p.add_(torch.randn_like(p))
        out = model(**batches()[0]).logits
    piece.save(str(tmp_path))
    again = vit()
    inlay.load(again, str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(**batches()[0]).logits, out)
    piece.merge()
    with torch.no_grad():
        torch.testing.assert_close(model(**batches()[0]).logits, out, atol=1e-4, rtol=1e-4)
