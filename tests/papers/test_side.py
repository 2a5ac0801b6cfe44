"""Side networks against their equations, and what they are for: no graph and no activation of the trunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import inlay
from inlay.core.errors import AdapterError, CheckpointError, OptionError, SiteError
from inlay.core.trunks import trunks
from inlay.methods import LoRA, SideTuning, UniPT
from inlay.train.measure import Watch, saved_for_backward, storages

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def made(auto: str, kind: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **config))
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model.eval()


def bert(**config: Any) -> nn.Module:
    return made("AutoModelForSequenceClassification", "bert", **SMALL | {"num_labels": 3} | config)


def llama() -> nn.Module:
    return made("AutoModelForCausalLM", "llama", **SMALL, num_key_value_heads=2)


def resnet() -> nn.Module:
    return made("AutoModelForImageClassification", "resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                num_labels=3)  # fmt: skip


def stirred(model: nn.Module, method: Any, **options: Any) -> inlay.Adapter:
    adapter = inlay.adapt(model, method, head=None, **options)
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return adapter


def text(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Rows that end in padding."""
    ids, mask = torch.randint(3, 40, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    mask[1, 5:], mask[2, 3:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def named(adapter: inlay.Adapter) -> dict[str, Tensor]:
    return {n: p.detach().double() for n, p in adapter.levels[0].method.named_parameters()}


def ln(h: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return unit * p[f"{name}.weight"] + p[f"{name}.bias"]


def lin(h: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]


# ---------------------------------------------------------------------- the equations
def side(x: Tensor, real: list[bool], p: dict[str, Tensor], layers: int, heads: int, causal: bool) -> Tensor:
    """S(x) of one sequence (tokens, features), head by head and query by query."""
    h = lin(x, p, "side.enter")
    n, r = h.shape
    size = r // heads
    for layer in range(layers):
        name = f"side.layers.{layer}"
        q, k, v = lin(ln(h, p, f"{name}.norm1"), p, f"{name}.qkv").split(r, 1)
        y = torch.zeros_like(h)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            qs, ks = ([turned(t[i, part], i) if causal else t[i, part] for i in range(n)] for t in (q, k))
            for i in range(n):
                keys = [j for j in range(n) if real[j] and (not causal or j <= i)] or [i]
                weights = torch.stack([qs[i] @ ks[j] for j in keys]).div(size**0.5).softmax(0)
                y[i, part] = sum((w * v[j, part] for w, j in zip(weights, keys, strict=True)), torch.zeros(size))
        h = h + lin(y, p, f"{name}.o")
        h = h + lin(F.gelu(lin(ln(h, p, f"{name}.norm2"), p, f"{name}.up")), p, f"{name}.down")
    return lin(ln(h, p, "side.norm"), p, "side.leave")


def turned(h: Tensor, place: int) -> Tensor:
    """Rotary position: the two halves as real and imaginary parts, each turned at its own rate."""
    half = len(h) // 2
    z = torch.complex(h[:half], h[half:])
    angle = torch.tensor([place * 10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag])


def states(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad(), inlay.disabled(model):
        return [h.double() for h in model(**inputs, output_hidden_states=True).hidden_states]


def test_side_tuning_is_its_equation():
    model, inputs = bert(), text()
    adapter = stirred(model, SideTuning(r=8, heads=2, depth=2, alpha=0.3))
    hidden, p = states(model, inputs), named(adapter)
    alpha = p["a"].sigmoid()
    out = torch.stack([
        alpha * y + (1 - alpha) * side(x, keep, p, 2, 2, causal=False)
        for x, y, keep in zip(hidden[0], hidden[-1], inputs["attention_mask"].bool().tolist(), strict=True)
    ])  # fmt: skip
    expected = model.classifier(torch.tanh(model.bert.pooler.dense(out[:, 0].float())))
    assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)


def test_side_tuning_of_a_decoder_is_causal():
    model, ids = llama(), torch.randint(3, 40, (2, 6))
    adapter = stirred(model, SideTuning(r=8, heads=2, depth=1, blend="fixed", alpha=0.4))
    hidden, p = states(model, {"input_ids": ids}), named(adapter)
    out = torch.stack([
        0.4 * y + 0.6 * side(x, [True] * 6, p, 1, 2, causal=True) for x, y in zip(hidden[0], hidden[-1], strict=True)
    ])  # fmt: skip
    assert torch.allclose(model(input_ids=ids).logits, model.lm_head(out.float()), atol=1e-5)
    shorter = model(input_ids=ids[:, :4]).logits
    assert torch.allclose(model(input_ids=ids).logits[:, :4], shorter, atol=1e-5)


def test_side_tuning_of_a_convolutional_network():
    model, images = resnet(), torch.randn(2, 3, 40, 32)
    adapter = stirred(model, SideTuning(r=4, depth=2))
    p = {n: t.float() for n, t in named(adapter).items()}
    with torch.no_grad(), inlay.disabled(model):
        x = model.resnet.embedder(images)
        y = model.resnet.encoder(x).last_hidden_state
    h = F.conv2d(x, p["side.enter.weight"], p["side.enter.bias"])
    for i in range(2):
        h = F.conv2d(h, p[f"side.layers.{i}.weight"], p[f"side.layers.{i}.bias"], 2, 1).relu()
    s = F.conv2d(F.adaptive_avg_pool2d(h, y.shape[2:]), p["side.leave.weight"], p["side.leave.bias"])
    alpha = p["a"].sigmoid()
    expected = model.classifier((alpha * y + (1 - alpha) * s).mean((2, 3), keepdim=True))
    assert torch.allclose(model(images).logits, expected, atol=1e-5)
    assert adapter.adapter_parameters == 4 * (8 + 16 + 1) + 16 + 2 * (9 * 16 + 4) + 1


@pytest.mark.parametrize("residual", [True, False])
def test_unipt_is_its_equation(residual):
    model, inputs = bert(), text()
    adapter = stirred(model, UniPT(factor=2, residual=residual))
    hidden, p, out = states(model, inputs), named(adapter), []
    for row, keep in enumerate(inputs["attention_mask"].bool()):
        t = [ln(lin(h[row], p, f"downs.{i}"), p, f"norms.{i}") for i, h in enumerate(hidden)]
        a, found, scores = t.pop(), [], []
        for t_i in t:
            alike = (a @ t_i.T).relu() * keep
            W = alike / alike.sum(1, keepdim=True).clamp_min(1e-8) + torch.eye(len(alike))
            found.append(W @ t_i)
            scores.append(p["gate.weight"][0] @ (a[keep].mean(0) * t_i[keep].mean(0)))
        c = torch.stack(scores).softmax(0)
        merged = sum((c_i * g for c_i, g in zip(c, found, strict=True)), torch.zeros_like(a))
        up = lin((a + ln(lin(merged, p, "projection"), p, "settled")).relu(), p, "up")
        out.append(hidden[-1][row] + up if residual else up)
    whole = torch.stack(out)
    expected = model.classifier(torch.tanh(model.bert.pooler.dense(whole[:, 0].float())))
    assert torch.allclose(model(**inputs).logits, expected, atol=1e-4)


def test_counts():
    """Σ (d r + 3 r) over the blocks' states and the anchor, r = d/D, with gate, projection and W_up; S and its α."""
    model = bert(hidden_size=32)
    unipt = inlay.adapt(model, UniPT(factor=4), head=None, name="unipt")
    assert unipt.adapter_parameters == 4 * (32 * 8 + 3 * 8) + 8 + (8 * 8 + 3 * 8) + (8 * 32 + 32)
    one = inlay.adapt(model, UniPT(factor=4), head=None, name="one", layers=[2])
    assert one.adapter_parameters == 2 * (32 * 8 + 3 * 8) + (8 * 8 + 3 * 8) + (8 * 32 + 32)
    tuned = inlay.adapt(model, SideTuning(r=8, depth=3), head=None, name="side")
    assert tuned.adapter_parameters == 8 * (32 + 32 + 1) + 32 + 16 + 3 * (12 * 64 + 13 * 8) + 1


# ---------------------------------------------------------------------- what they are for
@pytest.mark.parametrize("method", [SideTuning(r=8), UniPT()], ids=["SideTuning", "UniPT"])
def test_the_trunk_runs_without_a_graph(method):
    model, inputs = bert(), text()
    inlay.adapt(model, method)
    seen: list[tuple[str, bool]] = []
    for name, module in model.bert.named_modules():
        if name.startswith(("embeddings", "encoder.layer")):
            module.register_forward_hook(lambda m, args, y, name=name: seen.append((name, tensor(y).requires_grad)))
    model.train()
    out = model(**inputs, labels=torch.tensor([0, 1, 2]))
    assert out.loss.requires_grad
    assert len(seen) > 30
    assert not [name for name, asks in seen if asks]
    out.loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("inlay."))


def tensor(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]


def costs(method: Any, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """(bytes saved for backward, peak bytes of activations and gradients) of a training step."""
    inlay.adapt(model, method)
    labels = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
    watch = Watch(storages([*model.parameters(), *model.buffers(), *inputs.values()]))
    with watch:
        loss, saved = saved_for_backward(lambda: model(**inputs, labels=labels).loss, model)
        loss.backward()
    inlay.detach(model)
    return saved, watch.peak


def test_memory_of_a_step_is_that_of_the_frozen_forward():
    """On a BERT of 12 blocks: side-tuning costs a few states more, UniPT one per block and what compares its tokens."""
    wide = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 12, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0}  # fmt: skip
    model, ids = bert(**wide).requires_grad_(False), torch.randint(3, 40, (8, 48))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    watch = Watch(storages([*model.parameters(), *model.buffers(), *inputs.values()]))
    with watch, torch.no_grad():
        model(**inputs)
    state = 8 * 48 * 64 * 4
    saved, peak = zip(*(costs(m, model, inputs) for m in (SideTuning(r=16, depth=1), UniPT(factor=8), LoRA(r=4))),
                      strict=True)  # fmt: skip
    assert saved[0] < 8 * state
    assert saved[1] < (12 + 18) * state
    assert saved[2] > 100 * state  # what a graph through the trunk keeps
    assert peak[0] < watch.peak + 8 * state
    assert peak[1] < watch.peak + (12 + 24) * state
    assert peak[2] > 4 * peak[0]
    assert peak[2] > 2 * peak[1]


# ---------------------------------------------------------------------- blends
def share(method: Any) -> float:
    return float(torch.as_tensor(method.share()).detach())


def test_learned_blend_moves_and_tells_how_much_the_base_is_used():
    model, inputs = bert(), text()
    adapter = inlay.adapt(model, SideTuning(r=8))
    (level,) = [lv for lv in adapter.levels if not lv.head]
    assert share(level.method) == pytest.approx(0.5)
    optimizer = inlay.optimizer(adapter, 1e-2)
    for _ in range(3):
        model(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert share(level.method) != pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (SideTuning(r=8, blend="fixed", alpha=0.25), lambda n: 0.25),
        (SideTuning(r=8, blend="linear", alpha=1.0, end=0.2), lambda n: 1 - 0.8 * n / 4),
        (SideTuning(r=8, blend="hyperbolic", k=2.0), lambda n: 2 / (2 + n)),
    ],
    ids=["fixed", "linear", "hyperbolic"],
)
def test_scheduled_blends(method: SideTuning, expected: Callable[[int], float], tmp_path):
    model, inputs = bert(), text()
    base = model(**inputs).logits
    adapter = inlay.adapt(model, method)
    if method.starts_at_base:
        assert torch.allclose(base, model(**inputs).logits, atol=1e-6)
    (level,) = [lv for lv in adapter.levels if not lv.head]
    for n in range(5):
        assert share(level.method) == pytest.approx(expected(n))
        inlay.step(model, (n + 1) / 4)
    adapter.save(str(tmp_path))
    fresh = bert()
    inlay.load(fresh, str(tmp_path))
    assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)
    assert not torch.allclose(base, fresh(**inputs).logits, atol=1e-3)


def test_options_that_make_no_sense():
    for wrong in ({"r": 6}, {"alpha": 0.0}, {"blend": "fixed", "alpha": 1.0}, {"blend": "hyperbolic", "k": 0.0}):
        with pytest.raises(OptionError, match="SideTuning"):
            SideTuning(**wrong)


# ---------------------------------------------------------------------- generation
def prompts() -> dict[str, Tensor]:
    ids, mask = torch.randint(3, 40, (3, 5)), torch.ones(3, 5, dtype=torch.long)
    ids[1, :2], mask[1, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_generation_with_a_cache_is_generation_without_one():
    model = llama()
    stirred(model, SideTuning(r=8, heads=2))
    options = {"max_new_tokens": 8, "do_sample": False}
    inputs = prompts()
    for beams in (1, 3):
        cached = model.generate(**inputs, **options, num_beams=beams)
        assert torch.equal(cached, model.generate(**inputs, **options, num_beams=beams, use_cache=False))
    alone = model.generate(input_ids=inputs["input_ids"][1:2, 2:], **options)
    batch = model.generate(**inputs, **options)[1:2, 5:]
    assert torch.equal(alone[:, 3:], batch[:, : alone.shape[1] - 3])
    with pytest.raises(AdapterError, match="a static cache has no room"):
        model.generate(**inputs, **options, cache_implementation="static", disable_compile=True)


def test_a_cache_filled_without_the_side_network_is_refused():
    model, ids = llama(), torch.randint(3, 40, (1, 4))
    stirred(model, SideTuning(r=8, heads=2))
    with inlay.disabled(model):
        cache = model(input_ids=ids).past_key_values
    with pytest.raises(AdapterError, match="holds 4 tokens, but 0 of"):
        model(input_ids=ids[:, :1], past_key_values=cache)


# ---------------------------------------------------------------------- places
def test_trunks_of_architectures():
    found = {t.label: t for t in trunks(llama())}
    assert list(found) == [""]
    assert (found[""].path, found[""].blocks[0], found[""].causal) == ("model.norm", "model.layers.0", True)
    (maps,) = trunks(resnet())
    assert (maps.of_maps, maps.width_in, maps.width) == (True, 8, 16)
    clip = made("AutoModel", "clip", text_config=SMALL, vision_config={
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 16,
        "patch_size": 8})  # fmt: skip
    assert {t.label: t.width for t in trunks(clip)} == {"text": 16, "vision": 24}
    adapter = inlay.adapt(clip, SideTuning(r=8), where="vision.block[1]")
    assert [level.site.name for level in adapter.levels] == ["vision.trunk"]
    falcon = made("AutoModelForCausalLM", "falcon", **{k: v for k, v in SMALL.items() if k != "intermediate_size"})
    mamba = made("AutoModelForCausalLM", "mamba", vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    assert trunks(falcon)[0].causal
    assert trunks(mamba)[0].causal
    with pytest.raises(SiteError, match="knows none in Sequential"):
        inlay.adapt(nn.Sequential(nn.Linear(4, 4)), SideTuning())
    with pytest.raises(SiteError, match="gives a map"):
        inlay.adapt(resnet(), UniPT())
    with pytest.raises(SiteError, match="layers cannot be chosen"):
        inlay.adapt(bert(), SideTuning(), layers=[1])


def test_another_base_is_refused(tmp_path):
    stirred(bert(), UniPT()).save(str(tmp_path))
    other = bert()
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight.add_(0.1)
    with pytest.raises(CheckpointError, match="another base"):
        inlay.load(other, str(tmp_path))


def test_with_methods_inside_the_trunk():
    """A LoRA below is trained as well: gradients pass where something asks for them."""
    model, inputs = bert(), text()
    inlay.adapt(model, [LoRA(r=2), UniPT(residual=True)])
    for n, p in model.inlay.named_parameters():
        if "up." in n or n.endswith(".B"):
            nn.init.normal_(p, std=0.1)
    model(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
    asked = {n: p.grad is not None and bool(p.grad.ne(0).any()) for n, p in model.inlay.named_parameters()}
    assert all(asked.values()), [n for n, got in asked.items() if not got]
