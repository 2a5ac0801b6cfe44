"""Vectors among the hidden states of vision towers (VPT, PGN) against forward passes written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from token_models import TEXT, close, lively, randomised
from torch import Tensor, nn
from vision_models import TOWERS, Timm, by_hand, clip, images, tower

import inlay
from inlay.core.active import attached
from inlay.core.errors import CheckpointError, MergeError, RouteError, SiteError
from inlay.core.inserted import Inserted
from inlay.methods import PGN, VPT, LoRA, LoReFT, PrefixTuning, VisualPrompt

P = 3


def prompted(model: nn.Module, name: str = "default", seed: int = 3, **options: Any) -> Tensor:
    """Attach VPT far from its start; returns P (depth, p, d)."""
    adapter = randomised(inlay.adapt(model, VPT(**{"tokens": P, **options}), name=name, head=None), seed=seed)
    return adapter.levels[0].method.P.detach().clone()


def lead(model: Any) -> int:
    return 0 if "siglip" in model.config.model_type else 1


# ------------------------------------------------------------------------------------------------ the equation
@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("kind", TOWERS)
def test_vectors_stand_after_the_class_token_and_are_replaced_before_each_block(kind: str, deep: bool) -> None:
    model, x = tower(kind), images()
    at, base = lead(model), model(x)
    prompts = prompted(model, deep=deep)
    out = model(x)

    def put(i: int, h: Tensor) -> Tensor:
        if i >= len(prompts):
            return h
        rest = h[:, at:] if i == 0 else h[:, at + P :]
        return torch.cat([h[:, :at], prompts[i].expand(len(h), -1, -1), rest], 1)

    with inlay.disabled(model):
        hand = by_hand(model, x, put, lambda h: torch.cat([h[:, :at], h[:, at + P :]], 1))
    close(out.last_hidden_state, hand)
    assert not torch.allclose(out.last_hidden_state, base.last_hidden_state, atol=1e-2)
    assert out.pooler_output is None or out.pooler_output.shape == base.pooler_output.shape
    with inlay.disabled(model):
        assert torch.equal(model(x).last_hidden_state, base.last_hidden_state)


@pytest.mark.parametrize("deep", [True, False])
def test_every_block_reads_one_length_and_the_user_sees_another(deep: bool) -> None:
    model, x, seen = tower("vit", attention="eager"), images(), []
    for block in model.layers:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    prompted(model, deep=deep)
    for block in model.layers:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    out = model(x, output_hidden_states=True, output_attentions=True)
    assert seen == [1 + P + 4] * 6
    assert [h.shape[1] for h in out.hidden_states] == [5] * 4
    assert [a.shape[2:] for a in out.attentions] == [(5, 5 + P)] * 3


def test_a_shared_map_takes_narrow_vectors_to_the_width_of_the_model() -> None:
    model, x = tower("dinov2"), images()
    adapter = randomised(inlay.adapt(model, VPT(tokens=P, width=5), head=None))
    method = adapter.levels[0].method
    wide = nn.functional.linear(method.P, method.W, method.b).detach()
    out = model(x).last_hidden_state
    inlay.detach(model)
    with torch.no_grad():
        inlay.adapt(model, VPT(tokens=P), head=None).levels[0].method.P.copy_(wide)
    close(model(x).last_hidden_state, out)


def test_pooling_that_averages_patches_does_not_see_the_vectors() -> None:
    model, x = tower("dinov2", transformers.AutoModelForImageClassification, num_labels=3), images()
    prompted(model)
    hidden = model.dinov2(x).last_hidden_state
    close(model(x).logits, model.classifier(torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1)))


# ------------------------------------------------------------------------------------------------ rows, masks, company
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dinov2", "clip_vision_model", "siglip_vision_model"])
def test_rows_with_different_numbers_of_vectors(kind: str, attention: str) -> None:
    model, x = tower(kind, attention=attention), images()
    prompted(model)
    prompted(model, "b", seed=4, tokens=1, deep=False)
    names = ["b", None, "default", "b"]
    with inlay.route(model, names):
        routed = model(x).last_hidden_state
    for i, name in enumerate(names):
        inlay.use(model, *filter(None, [name]))
        close(routed[i], model(x[i : i + 1]).last_hidden_state[0])


@pytest.mark.parametrize("routed", [False, True])
def test_a_mask_over_the_users_tokens_is_widened(routed: bool) -> None:
    model, x = tower("vit"), images(2)
    prompted(model)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]])
    with inlay.route(model, ["default", None if routed else "default"]):
        out = model(x, attention_mask=mask).last_hidden_state
    close(out[0], model(x[:1]).last_hidden_state[0])
    assert not torch.allclose(out[1], model(x[1:]).last_hidden_state[0], atol=1e-3)
    inlay.use(model, *([] if routed else ["default"]))
    close(out[1], model(x[1:], attention_mask=mask[1:]).last_hidden_state[0])


def test_blocks_that_take_no_mask() -> None:
    torch.manual_seed(0)
    model, x = lively(Timm()), images()
    base = model(x)
    adapter = randomised(inlay.adapt(model, VPT(tokens=P), head=None))
    out = model(x)
    assert adapter.adapter_parameters == 2 * P * 16
    assert not torch.allclose(out, base, atol=1e-2)
    with inlay.route(model, ["default"] * 4):
        close(model(x), out)
    with inlay.route(model, ["default", None] * 2), pytest.raises(RouteError, match="take no attention mask"):
        model(x)
    inlay.use(model)
    assert torch.equal(model(x), base)


def test_two_adapters_stand_side_by_side() -> None:
    model, x = tower("vit"), images()
    a, b = prompted(model), prompted(model, "b", seed=4, tokens=2)
    inlay.use(model, "default", "b")
    both = model(x).last_hidden_state
    inlay.detach(model)
    with torch.no_grad():
        adapter = inlay.adapt(model, VPT(tokens=P + 2), head=None)
        adapter.levels[0].method.P.copy_(torch.cat([a, b], 1))
    close(both, model(x).last_hidden_state)


def test_prefixes_and_edited_positions_in_company() -> None:
    """LoReFT counts the user's tokens, and keys of a prefix are masked with the vectors' where rows differ."""
    model, x = tower("vit"), images()
    prompted(model)
    edits = inlay.adapt(model, LoReFT(r=2, positions="f1"), "block[1]", name="edits", head=None)
    randomised(edits)
    changed: list[Tensor] = []
    model.layers[1].register_forward_hook(lambda module, args, y: changed.append(y.detach()))
    for names in (["default"], ["default", "edits"]):
        inlay.use(model, *names)
        model(x)
    moved = (changed[0] - changed[1]).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [True] + [False] * (P + 4)
    randomised(inlay.adapt(model, PrefixTuning(tokens=2), name="prefix", head=None))
    with inlay.route(model, ["default", "prefix", None, "edits"]):
        routed = model(x).last_hidden_state
    for i, name in enumerate(["default", "prefix", None, "edits"]):
        inlay.use(model, *filter(None, [name]))
        close(routed[i], model(x[i : i + 1]).last_hidden_state[0])


@pytest.mark.parametrize("method", [VPT(tokens=P), PGN(tokens=2, library=5, side=16)])
def test_recomputed_blocks_read_the_vectors_of_their_own_forward(method: Any) -> None:
    model, x = tower("dinov2"), images()
    adapter = randomised(inlay.adapt(model, method, head=None), 0.1)
    other = randomised(inlay.adapt(model, VPT(tokens=1), name="other", head=None))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.train()
        inlay.use(model, "default")
        torch.manual_seed(0)
        loss = model(x).last_hidden_state.square().mean()
        inlay.use(model, "other")
        loss = loss + model(images(2, seed=5)).last_hidden_state.square().mean()
        inlay.use(model, "default")
        tensors = [*adapter.parameters(), *other.parameters()]
        for p in tensors:
            p.requires_grad_()
        found.append(torch.autograd.grad(loss, [*adapter.parameters()]))
    for a, b in zip(*found, strict=True):
        close(a, b)


# ------------------------------------------------------------------------------------------------ places and files
def test_the_vision_tower_of_a_model_with_two() -> None:
    model, x = clip(), images()
    words = torch.randint(3, 60, (4, 6))
    base = model(input_ids=words, pixel_values=x)
    adapter = randomised(inlay.adapt(model, VPT(tokens=P), head=None))
    assert [level.site.name for level in adapter.levels] == ["vision.embed"]
    out = model(input_ids=words, pixel_values=x)
    assert torch.equal(out.text_embeds, base.text_embeds)
    assert not torch.allclose(out.image_embeds, base.image_embeds, atol=1e-3)
    pooled = model.vision_model(x).pooler_output  # the tower by itself
    close(out.image_embeds, nn.functional.normalize(model.visual_projection(pooled), dim=-1))
    inlay.adapt(model, VPT(tokens=P), "vision.embed", name="named", head=None)
    inlay.adapt(model, VPT(tokens=P), "vision_model", name="root", head=None)
    with pytest.raises(SiteError, match=r"goes where images enter \('vision.embed'\), not to 'text.embed'"):
        inlay.adapt(model, VPT(), "text.embed", name="wrong")
    with pytest.raises(SiteError, match=r"no place where images enter .* in layers \[0\]"):
        inlay.adapt(model, VPT(), layers=[0], name="wrong")
    with pytest.raises(SiteError, match="no place where images enter"):
        inlay.adapt(model, VPT(), exclude=["vision.embed"], name="wrong")


@pytest.mark.parametrize("method", [VPT(), PGN()])
def test_models_without_patches_are_refused(method: Any) -> None:
    for config in (
        transformers.ResNetConfig(hidden_sizes=[8], embedding_size=8, depths=[1]),
        transformers.BertConfig(**TEXT),
    ):
        model = transformers.AutoModel.from_config(config)
        with pytest.raises(SiteError, match=f"architecture {config.model_type}. has no tower of them that inlay knows"):
            inlay.adapt(model, method)


@pytest.mark.parametrize("method", [VPT(), PGN(tokens=2, library=4, side=16), VisualPrompt(size=2)])
def test_merging_is_refused_and_files_know_their_base(method: Any, tmp_path: Any) -> None:
    model, x = tower("vit"), images()
    adapter = randomised(inlay.adapt(model, method, head=None), 0.1)
    reason = "acts on the images before the model" if isinstance(method, VisualPrompt) else "adds tokens"
    with pytest.raises(MergeError, match=f"cannot be merged: it {reason}"):
        adapter.merge()
    out = model(x).last_hidden_state
    adapter.save(str(tmp_path))
    inlay.detach(model)
    inlay.load(model, str(tmp_path))
    assert torch.equal(model(x).last_hidden_state, out)
    other = tower("vit")
    with torch.no_grad():
        other.embeddings.patch_embeddings.projection.weight.mul_(1.5)
        for block in other.layers:
            block.attention.k_proj.weight.mul_(1.5)
    with pytest.raises(CheckpointError, match="trained on another base"):
        inlay.load(other, str(tmp_path))


def test_lora_beside_vectors() -> None:
    model, x = tower("dinov2"), images()
    adapter = inlay.adapt(model, [LoRA(r=2).on("attn.q"), VPT(tokens=P)], head=None)
    randomised(adapter, 0.1)
    assert {type(level.method) for level in adapter.levels} == {LoRA, VPT}
    assert model(x).last_hidden_state.shape == (4, 5, 32)
    inlay.delete(model, "default")
    assert not any(isinstance(mount, Inserted) for mount in attached(model).state.tokens.values())


# ------------------------------------------------------------------------------------------------ generated prompts
def test_a_prompt_is_a_mixture_of_the_library_for_each_image() -> None:
    model, x = tower("vit"), images()
    method = randomised(inlay.adapt(model, PGN(tokens=4, library=6, side=32), head=None), 0.3).levels[0].method
    shares = method.mixture(x)
    assert shares.shape == (4, 4, 6)
    close(shares.sum(2), torch.ones(4, 4))
    assert (shares[0] - shares[1]).abs().max() > 1e-3
    close(method.inserted(0, x)[2], shares[2] @ method.T)
    assert method.inserted(1, x) is None
    assert {name for name in method.stored() if "running" in name}  # statistics of g travel with it


def test_with_one_library_vector_prompts_do_not_depend_on_the_image() -> None:
    model, x = tower("vit"), images()
    method = randomised(inlay.adapt(model, PGN(tokens=2, library=1, side=16), head=None)).levels[0].method
    close(method.inserted(0, x), method.T.expand(4, 2, -1))


@pytest.mark.parametrize("kind", ["vit", "clip_vision_model"])
def test_sixteen_tokens_after_the_patches_of_a_patch_32_model(kind: str) -> None:
    """Sequence length 1 + 49 + 16; behind the patches, where the paper has them, the output is the same."""
    model, x, seen = tower(kind, image_size=224, patch_size=32), images(2, 224), []
    method = randomised(inlay.adapt(model, PGN(library=4), head=None), 0.3).levels[0].method
    (model.layers if kind == "vit" else model.encoder.layers)[0].register_forward_hook(
        lambda module, args, y: seen.append(y.shape[1])
    )
    out, prompts = model(x).last_hidden_state, method.inserted(0, x)
    assert seen == [66]
    with inlay.disabled(model):
        hand = by_hand(model, x, lambda i, h: torch.cat([h, prompts], 1) if i == 0 else h, lambda h: h[:, :-16])
    close(out, hand)
