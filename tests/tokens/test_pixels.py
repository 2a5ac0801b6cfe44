"""Visual prompts in pixel space, where images enter, and tokens written as pixels."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from token_models import close, randomised
from torch import Tensor, nn
from vision_models import by_hand, clip, images, resnet, tower

import inlay
from inlay.core.errors import AdapterError, SiteError
from inlay.data import Data, Prepared
from inlay.data.batches import Collate
from inlay.data.prepare import image_side
from inlay.methods import PGN, VPT, LoRA, VisualPrompt
from inlay.methods.input.inversion import inverted, patches_of, with_patches
from inlay.models import Opened
from inlay.recipe import Recipe
from inlay.work import Work


def attach(model: nn.Module, method: Any, scale: float = 0.5, **more: Any) -> Any:
    """The built method, far from its start."""
    return randomised(inlay.adapt(model, method, head=None, **more), scale).levels[0].method


# ------------------------------------------------------------------------------------------------ what is added
@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip_vision_model", "siglip_vision_model"])
def test_a_frame_is_added_to_the_images(kind: str) -> None:
    model, x = tower(kind), images()
    method = attach(model, VisualPrompt(size=2))
    frame = torch.zeros(3, 16, 16)
    V = {name: p.detach() for name, p in method.V.items()}
    frame[:, :2], frame[:, -2:], frame[:, 2:-2, :2], frame[:, 2:-2, -2:] = V["up"], V["down"], V["left"], V["right"]
    assert torch.equal(method.prompt(), frame)
    out = model(x).last_hidden_state
    with inlay.disabled(model):  # applied outside of the model it is the same, bit for bit
        assert torch.equal(model(x + frame).last_hidden_state, out)


def test_a_fixed_patch_lies_in_the_upper_left_corner() -> None:
    method = attach(tower("vit"), VisualPrompt(shape="fixed", size=5))
    V = method.prompt()
    assert torch.equal(V[:, :5, :5], method.V["patch"])
    assert V.count_nonzero() == 75


def test_a_random_patch_moves_in_training_and_rests_in_the_middle_otherwise() -> None:
    model, x = tower("vit"), images()
    method = attach(model, VisualPrompt(shape="random", size=4, init="normal"))
    assert torch.equal(method.prompt()[:, 6:10, 6:10], method.V["patch"])
    assert torch.equal(model(x).last_hidden_state, model(x).last_hidden_state)
    method.train()
    torch.manual_seed(0)
    corners = set()
    for _ in range(40):
        moved = method.before(x) - x
        torch.testing.assert_close(moved, moved[:1].expand_as(moved), atol=1e-5, rtol=0)  # one place for the batch
        rows, columns = (moved[0, 0].abs() > 1e-6).nonzero().unbind(1)
        corners.add((int(rows.min()), int(columns.min())))
        assert rows.max() - rows.min() == columns.max() - columns.min() == 3
    assert len(corners) > 20
    assert max(max(corner) for corner in corners) <= 12


def test_starts() -> None:
    model, x = tower("vit"), images()
    base = model(x).last_hidden_state
    inlay.adapt(model, VisualPrompt(), head=None)
    close(model(x).last_hidden_state, base)
    method = inlay.adapt(model, VisualPrompt(init="normal", size=7), name="noise", head=None).levels[0].method
    V = torch.cat([p.detach().flatten() for p in method.V.values()])
    assert abs(float(V.mean())) < 0.15
    assert 0.9 < float(V.std()) < 1.1


# ------------------------------------------------------------------------------------------------ where, and how large
def test_the_size_is_that_of_the_images() -> None:
    at = {name: inlay.adapt(model, VisualPrompt(), head=None, **more).levels[0].site.pixels for name, (model, more) in {
        "configuration": (tower("vit"), {}), "both towers": (clip(), {}),
        "given": (tower("dinov2"), {"image_size": 24}), "oblong": (tower("dinov2"), {"image_size": (24, 16)}),
        "grey": (resnet(num_channels=1), {"image_size": 20}),
    }.items()}  # fmt: skip
    assert at == {"configuration": (3, 16, 16), "both towers": (3, 16, 16), "given": (3, 24, 24),
                  "oblong": (3, 24, 16), "grey": (1, 20, 20)}  # fmt: skip
    with pytest.raises(SiteError, match=r"configuration of ResNetForImageClassification does not state: .*image_size="):
        inlay.adapt(resnet(), VisualPrompt())


def test_the_frame_grows_with_the_images() -> None:
    sizes = {}
    for side in (16, 56, 112, 224):
        method = attach(tower("dinov2"), VisualPrompt(), image_size=side)
        sizes[side] = method.V["up"].shape[1]
    assert sizes == {16: 2, 56: 8, 112: 15, 224: 30}


def test_images_of_another_size_are_refused() -> None:
    model = tower("dinov2")
    attach(model, VisualPrompt(size=2), image_size=24)
    with pytest.raises(AdapterError, match=r"images of 3×24×24 .* is given 3×16×16: .*image_size=\(16, 16\)"):
        model(images())
    with pytest.raises(SiteError, match="a frame of 8 pixels leaves nothing of images of 16 by 16"):
        inlay.adapt(tower("vit"), VisualPrompt(size=8))
    with pytest.raises(SiteError, match="a patch of 17 pixels does not fit"):
        inlay.adapt(tower("vit"), VisualPrompt(size=17, shape="fixed"))


def test_a_convolutional_network(tmp_path: Any) -> None:
    model, x = resnet(), images(side=32)
    adapter = randomised(inlay.adapt(model, [VisualPrompt(size=3), LoRA(r=2).on("stem.conv")], image_size=32))
    level = adapter.levels[0]
    assert (level.site.name, level.site.path) == ("stem", "resnet.embedder")
    labels = torch.tensor([0, 1, 2, 0])
    out = model(labels=labels, pixel_values=x)  # the images are found wherever they stand in the call
    V = level.method.prompt()
    adapter.save(str(tmp_path))
    inlay.detach(model)
    loaded = inlay.load(model, str(tmp_path))
    assert torch.equal(model(pixel_values=x, labels=labels).logits, out.logits)
    loaded.levels[0].method.V.apply(lambda module: None)
    with torch.no_grad():
        for p in loaded.levels[0].method.parameters():
            p.zero_()
    close(model(pixel_values=x + V).logits, out.logits)
    with pytest.raises(SiteError, match=r"goes where images enter \('stem'\), not to 'conv'"):
        inlay.adapt(resnet(), VisualPrompt(), "conv", image_size=32)


def test_a_network_of_unknown_architecture() -> None:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    model, x = nn.Sequential(OrderedDict(stem=stem, conv=nn.Conv2d(4, 3, 3))), images(channels=2)
    base = model(x)
    for where in (None, "stem", "stem.0"):
        method = attach(model, VisualPrompt(size=2), where=where, image_size=16)
        out = model(x)
        assert not torch.allclose(out, base, atol=1e-3)
        V = method.prompt()
        inlay.detach(model)
        close(model(x + V), out)
    with pytest.raises(SiteError, match=r"'stem\.1' has no convolution that could read them"):
        inlay.adapt(model, VisualPrompt(), "stem.1", image_size=16)


def test_rows_with_and_without_a_prompt() -> None:
    model, x = tower("vit"), images()
    attach(model, VisualPrompt(size=2))
    with inlay.route(model, ["default", None] * 2):
        routed = model(x).last_hidden_state
    for name, rows in (("default", [0, 2]), (None, [1, 3])):
        inlay.use(model, *filter(None, [name]))
        close(routed[rows], model(x).last_hidden_state[rows])


class Processor:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        return self.settings


def test_what_a_processor_says_of_its_images() -> None:
    square = {"height": 7, "width": 9}
    assert image_side(Processor(size={"shortest_edge": 8}, crop_size=square, do_center_crop=True)) == (7, 9)
    assert image_side(Processor(size={"shortest_edge": 8}, crop_size=square, do_center_crop=False)) == 8
    assert image_side(Processor(size=square)) == (7, 9)
    assert image_side(Processor(size={"longest_edge": 4})) is None


def test_a_recipe_says_how_large_images_are() -> None:
    """Its own size, or else that of the processor; both differ from the configuration's 16."""
    processor = Processor(size={"shortest_edge": 8}, crop_size={"height": 40, "width": 32}, do_center_crop=True)
    data = Data("squares", "image-classification", {}, ["a", "b"], "", "", "")
    for size, expected in ((24, (3, 24, 24)), (None, (3, 40, 32))):
        opened = Opened(tower("dinov2"), processor, "", "", "", [])
        prepared = Prepared(data.task, {}, Collate(), processor, None, None, "")
        work = Work(opened, data, prepared, torch.device("cpu"), "float32")
        adapter = work.attach(Recipe(model="", data="", method="visualprompt", image_size=size))
        assert adapter.levels[0].site.pixels == expected


# ------------------------------------------------------------------------------------------------ tokens as pixels
@pytest.mark.parametrize("bias", [False, True])
def test_every_vector_is_the_embedding_of_a_patch(bias: bool) -> None:
    torch.manual_seed(0)
    conv = (
        nn.Conv2d(3, 48, 4, 4, bias=bias).double().requires_grad_(False)
    )  # square: as for a patch of 16 pixels and 768 features
    p = torch.randn(2, 5, 48, dtype=torch.float64)
    u = patches_of(p, conv)
    assert u.shape == (2, 5, 3, 4, 4)
    assert float((conv(u.flatten(0, 1)).flatten(1).view_as(p) - p).abs().max()) < 1e-12
    wide = nn.Conv2d(3, 20, 8, 8, bias=bias).double().requires_grad_(False)
    u = patches_of(p[..., :20], wide)
    assert float((wide(u.flatten(0, 1)).flatten(1).view(2, 5, 20) - p[..., :20]).abs().max()) < 1e-12
    smallest = (p[..., :20] - (wide.bias if bias else 0)) @ torch.linalg.pinv(wide.weight.flatten(1)).T
    close(u.flatten(2), smallest, 1e-10)


def test_embeddings_that_cannot_be_inverted() -> None:
    with pytest.raises(SiteError, match="a patch has 12 pixels, fewer than the 13 features"):
        patches_of(torch.zeros(1, 13), nn.Conv2d(3, 13, 2, 2))
    flat = nn.Conv2d(3, 4, 2, 2)
    nn.init.ones_(flat.weight)
    with pytest.raises(SiteError, match="is singular"):
        patches_of(torch.zeros(1, 4), flat)
    with pytest.raises(SiteError, match="its kernel must equal its stride"):
        patches_of(torch.zeros(1, 4), nn.Conv2d(3, 4, 3, 2))
    with pytest.raises(ValueError, match="3 patches of 4 pixels fill no whole rows of images 8 pixels wide"):
        with_patches(images(1, 8), torch.zeros(1, 3, 3, 4, 4))


@pytest.mark.parametrize("kind", ["vit", "clip_vision_model"])
@pytest.mark.parametrize("method", [PGN(tokens=4, library=5, side=16), VPT(tokens=4, deep=False)])
def test_a_frozen_model_out_of_reach_gives_the_same_for_a_taller_image(kind: str, method: Any) -> None:
    """All that the remote model must do is to take more patches than it has positions for."""
    model, x = tower(kind).double(), images().double()
    randomised(inlay.adapt(model, method, head=None, dtype=torch.float64), 0.3)
    out = model(x).last_hidden_state
    taller = with_patches(x, inverted(model, x))
    assert taller.shape == (4, 3, 16 + 16, 16)
    assert torch.equal(taller[:, :, :16], x)
    inlay.detach(model)
    conv = model.embeddings.patch_embeddings.projection if kind == "vit" else model.embeddings.patch_embedding

    def remote(i: int, h: Tensor) -> Tensor:
        if i:
            return h
        embedded = conv(taller).flatten(2).transpose(1, 2)
        return torch.cat([h, embedded[:, 4:]], 1)  # patches beyond the known positions get none

    close(by_hand(model, x, remote, lambda h: h[:, :-4]), out, 1e-10)


def test_what_no_pixel_reaches_is_not_inverted() -> None:
    model, x = tower("vit"), images()
    with pytest.raises(AdapterError, match="no adapter is attached"):
        inverted(model, x)
    inlay.adapt(model, LoRA(), head=None)
    with pytest.raises(AdapterError, match="no active adapter inserts tokens"):
        inverted(model, x)
    inlay.adapt(model, VPT(), name="deep", head=None)
    with pytest.raises(AdapterError, match="inserts tokens in later blocks"):
        inverted(model, x)
