"""CoOp, CoCoOp and MaPLe on CLIP, SigLIP and a ViT with a BERT: what stands where, and what it comes to."""

from __future__ import annotations

import pytest
import torch
from dual_models import CLASSES, FAMILIES, PROMPT, WORDS, dual_model, logits, pixels, words_tokenizer
from torch import Tensor, nn

import inlay
from inlay.core.errors import AdapterError, ComposeError, OptionError, RouteError, SiteError
from inlay.core.towers import towers
from inlay.data.prompts import class_prompts
from inlay.methods import VPT, CoCoOp, CoOp, LoRA, MaPLe


def prompts(family: str, prompt: str = PROMPT, classes: list[str] = CLASSES) -> dict[str, Tensor]:
    return class_prompts(classes, prompt, words_tokenizer(family))


def embedded(model: nn.Module, words: str) -> Tensor:
    table = next(tower.table for tower in towers(model) if tower.table is not None)
    return table.weight[[WORDS.index(word) for word in words.split()]].detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompts_own_words_give_the_zero_shot_logits(family):
    model = dual_model(family)
    before = logits(model, prompts(family), pixels())
    method = CoOp(tokens=4, init="words").with_prompt(PROMPT, words_tokenizer(family))
    assert method.starts_at_base
    inlay.adapt(model, method)
    assert torch.equal(before, logits(model, prompts(family), pixels()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("position", "written"),
    [("end", "red blue oak {}."), ("middle", "red {} blue oak."), ("front", "{} red blue oak.")],
)
def test_vectors_of_other_words_are_those_words(family, position, written):
    """Three vectors for four words: the sequence, its end and its padding move."""
    model, tokenizer = dual_model(family), words_tokenizer(family)
    expected = logits(model, prompts(family, written), pixels())
    adapter = inlay.adapt(model, CoOp(tokens=3, position=position).with_prompt(PROMPT, tokenizer))
    (level,) = adapter.levels
    level.method.v.data[:] = embedded(model, "red blue oak")
    torch.testing.assert_close(logits(model, prompts(family), pixels()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_vectors_than_words(family):
    model = dual_model(family)
    expected = logits(model, prompts(family, "red blue oak red blue oak {}."), pixels())
    adapter = inlay.adapt(model, CoOp(tokens=6).with_prompt(PROMPT, words_tokenizer(family)))
    adapter.levels[0].method.v.data[:] = embedded(model, "red blue oak red blue oak")
    torch.testing.assert_close(logits(model, prompts(family), pixels()), expected, rtol=1e-5, atol=1e-5)


def test_sixteen_vectors_in_the_middle_stand_eight_and_eight():
    model, seen = dual_model("clip"), []
    model.text_model.embeddings.position_embedding = nn.Embedding(40, 16)
    model.text_model.embeddings.position_ids = torch.arange(40)[None]
    inlay.adapt(model, CoOp(tokens=16, position="middle").with_prompt(PROMPT, words_tokenizer("clip")))
    model.text_model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    logits(model, prompts("clip"), pixels())
    (ids,) = seen
    cat, blank = WORDS.index("cat"), int(ids[0, 1])
    assert ids[0].tolist()[:21] == [1, *[blank] * 8, cat, *[blank] * 8, WORDS.index("."), WORDS.index("[EOS]"), 0]


def test_unified_contexts_serve_other_classes_and_class_specific_ones_do_not():
    model, tokenizer = dual_model("clip"), words_tokenizer("clip")
    inlay.adapt(model, CoOp(tokens=4).with_prompt(PROMPT, tokenizer), name="one")
    assert logits(model, prompts("clip", classes=["oak", "seven trucks"]), pixels()).shape == (3, 2)
    inlay.adapt(model, CoOp(tokens=4, classes=5).with_prompt(PROMPT, tokenizer), name="each")
    assert logits(model, prompts("clip"), pixels()).shape == (3, 5)
    with pytest.raises(AdapterError, match="contexts of 5 classes were trained, and there are 2"):
        logits(model, prompts("clip", classes=["oak", "seven trucks"]), pixels())


def test_class_features_can_be_kept():
    """The text tower alone gives the classifier: no image is needed."""
    model = dual_model("clip")
    inlay.adapt(model, CoOp(tokens=4).with_prompt(PROMPT, words_tokenizer("clip")))
    with torch.no_grad():
        texts = nn.functional.normalize(model.get_text_features(**prompts("clip")).pooler_output)
        images = nn.functional.normalize(model.get_image_features(pixels()).pooler_output)
    kept = model.logit_scale.exp() * images @ texts.T
    torch.testing.assert_close(kept, logits(model, prompts("clip"), pixels()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_cocoop_without_its_meta_net_is_coop(family):
    tokenizer = words_tokenizer(family)
    one, other = dual_model(family), dual_model(family)
    coop = inlay.adapt(one, CoOp(tokens=3, scale=0.5).with_prompt(PROMPT, tokenizer)).levels[0].method
    cocoop = inlay.adapt(other, CoCoOp(tokens=3, reduction=2).with_prompt(PROMPT, tokenizer)).levels[0].method
    cocoop.v.data[:] = coop.v[0]
    moved = logits(other, prompts(family), pixels())
    nn.init.zeros_(cocoop.meta[2].weight)
    nn.init.zeros_(cocoop.meta[2].bias)
    expected = logits(one, prompts(family), pixels())
    assert not torch.allclose(moved, expected, atol=1e-3)
    torch.testing.assert_close(logits(other, prompts(family), pixels()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_cocoop_image_by_image(family):
    """An image's row is that of CoOp with the context that its vector gives; the text tower reads B·C prompts."""
    model, tokenizer, counts = dual_model(family), words_tokenizer(family), []
    method = inlay.adapt(model, CoCoOp(tokens=3, reduction=2).with_prompt(PROMPT, tokenizer)).levels[0].method
    model.text_model.register_forward_pre_hook(lambda m, a, k: counts.append(len(k["input_ids"])), with_kwargs=True)
    found = logits(model, prompts(family), pixels())
    assert counts == [3 * len(CLASSES)]
    with inlay.disabled(model), torch.no_grad():
        f = nn.functional.normalize(model.get_image_features(pixels()).pooler_output)
        inner, _, outer = method.meta
        shift = outer(inner(f).clamp_min(0))
    plain = dual_model(family)
    coop = inlay.adapt(plain, CoOp(tokens=3).with_prompt(PROMPT, tokenizer)).levels[0].method
    for i in range(3):
        coop.v.data[0] = method.v.detach() + shift[i]
        alone = logits(plain, prompts(family), pixels()[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_chunks_are_the_whole():
    """Outputs and gradients, though all parts but the first are computed again."""
    results = []
    for chunk in (0, 4):
        model = dual_model("clip")
        method = CoCoOp(tokens=3, reduction=2, chunk=chunk).with_prompt(PROMPT, words_tokenizer("clip"))
        adapter = inlay.adapt(model, method, seed=4)
        out = model(pixel_values=pixels(), **prompts("clip")).logits_per_image
        inlay.use(model)  # whatever acts by then, the backward pass sees what acted
        nn.functional.cross_entropy(out, torch.tensor([0, 3, 1])).backward()
        results.append([out.detach(), *(p.grad for p in adapter.parameters())])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_maple_by_hand():
    """Text vectors put before every block by hooks on a plain model; image vectors are those of VPT with F_j(P_j)."""
    model, plain = dual_model("clip"), dual_model("clip")
    method = MaPLe(tokens=2, init="words", scale=0.5).with_prompt(PROMPT, words_tokenizer("clip"))
    assert method.words == [WORDS.index("a"), WORDS.index("photo")]  # "of a" stays
    adapter = inlay.adapt(model, method)
    maple = adapter.levels[0].method
    assert maple.P.shape == (2, 2, 16)  # the image tower has two blocks
    nn.init.normal_(maple.P, std=0.5)
    vpt = inlay.adapt(plain, VPT(tokens=2)).levels[0].method
    vpt.P.data = torch.stack([F(P) for F, P in zip(maple.F, maple.P, strict=True)]).detach()

    def first(module: nn.Module, args: tuple, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], maple.P[0].expand(len(x), -1, -1), x[:, 3:]], 1)

    def second(module: nn.Module, args: tuple) -> tuple:
        return (torch.cat([args[0][:, :1], maple.P[1].expand(len(args[0]), -1, -1), args[0][:, 3:]], 1), *args[1:])

    plain.text_model.embeddings.token_embedding.register_forward_hook(first)
    plain.text_model.encoder.layers[1].register_forward_pre_hook(second)
    expected = logits(plain, prompts("clip"), pixels())
    torch.testing.assert_close(logits(model, prompts("clip"), pixels()), expected, rtol=1e-5, atol=1e-5)


def test_maple_needs_patches():
    import transformers as t

    convolutions, text = t.MobileNetV2Config(depth_multiplier=0.35, image_size=32), dual_model("bert").text_model
    convolutions.hidden_size = 1280
    model = t.VisionTextDualEncoderModel(vision_model=t.MobileNetV2Model(convolutions), text_model=text)
    with pytest.raises(SiteError, match="MobileNetV2Model has no hidden states of them"):
        inlay.adapt(model, MaPLe())
    inlay.adapt(model, CoOp())


def test_checkpointed_blocks_see_their_vectors_again():
    gradients = []
    for on in (False, True):
        model = dual_model("clip")
        adapter = inlay.adapt(model, MaPLe(tokens=2, scale=0.5).with_prompt(PROMPT, words_tokenizer("clip")), seed=2)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        out = model(pixel_values=pixels(), **prompts("clip")).logits_per_image
        logits(model, prompts("clip", classes=["oak", "cat"]), pixels())  # another forward in between
        out.square().mean().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


# ---------------------------------------------------------------------- what cannot be right
def test_prompts_of_another_text_are_noticed():
    model, tokenizer = dual_model("clip"), words_tokenizer("clip")
    inlay.adapt(model, CoOp(tokens=4).with_prompt(PROMPT, tokenizer))
    with pytest.raises(AdapterError, match=r"was made for 'a photo of a \{\}.', and the class prompts"):
        logits(model, prompts("clip", "a blue {}."), pixels())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_room(family):
    model = dual_model(family)
    inlay.adapt(model, CoOp(tokens=13).with_prompt(PROMPT, words_tokenizer(family)))
    with pytest.raises(AdapterError, match="13 vectors and the longest class name are more than the text tower reads"):
        logits(model, prompts(family), pixels())


def test_options_and_places():
    tokenizer, model = words_tokenizer("clip"), dual_model("clip")
    with pytest.raises(OptionError, match="init='words' needs a prompt with words before its class"):
        inlay.adapt(model, CoOp(init="words"))
    with pytest.raises(OptionError, match=r"holds \{\} once"):
        CoOp().with_prompt("a photo", tokenizer)
    with pytest.raises(OptionError, match="must know the prompt"):
        inlay.adapt(model, CoOp(position="front"))
    with pytest.raises(SiteError, match="its one place: leave `where` out"):
        inlay.adapt(model, CoOp(), "vision.block[0]")
    with pytest.raises(SiteError, match="no image-text model with two towers"):
        inlay.adapt(model.text_model, CoOp())
    with pytest.raises(ComposeError, match="one of them at a time"):
        inlay.adapt(model, [CoOp(), MaPLe()])
    inlay.adapt(model, [LoRA(r=2), CoOp()])


def test_images_are_needed_for_prompts_of_their_own():
    model = dual_model("clip")
    inlay.adapt(model, CoCoOp(tokens=4).with_prompt(PROMPT, words_tokenizer("clip")))
    with pytest.raises(AdapterError, match="makes prompts for images: call the model itself"):
        model.get_text_features(**prompts("clip"))


def test_class_prompts_are_no_rows_to_route():
    """Two images and four classes: without a word every adapter's rows would be those of two classes."""
    model = dual_model("clip")
    inlay.adapt(model, LoRA(r=2), ["text.block[0].attn.q"], name="a")
    with inlay.route(model, ["a", None]), pytest.raises(RouteError, match="2 images meet 4 texts"):
        logits(model, prompts("clip", classes=CLASSES[:4]), pixels(2))
    inlay.adapt(model, CoOp(tokens=4).with_prompt(PROMPT, words_tokenizer("clip")), name="b")
    with inlay.route(model, ["b", None]), pytest.raises(RouteError, match="class prompts"):
        model.get_text_features(**prompts("clip", classes=CLASSES[:2]))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_both_towers(family):
    model = dual_model(family)
    adapter = inlay.adapt(model, LoRA(r=2), ["text.block[0].attn.q", "vision.block[1].attn.v"])
    out = model(pixel_values=pixels(), **prompts(family)).logits_per_image
    nn.functional.cross_entropy(out, torch.tensor([0, 1, 2])).backward()
    assert len(adapter.levels) == 2
    assert all(level.method.B.grad.abs().sum() > 0 for level in adapter.levels)
