"""Bottleneck adapters against computations written here, at every place they claim."""

from __future__ import annotations

import copy

import pytest
import torch
from hidden_bases import ACTS, BASES, base, batch, blocks, dense_bottleneck, layer_norm, rows_of, stir, then
from torch import nn

import inlay
from inlay.core.errors import MergeError, OptionError, SiteError
from inlay.core.merge import merge
from inlay.methods import IA3, Houlsby, LinAdapter, LoRA, NormTuning, ParallelAdapter, Pfeiffer

METHODS = [Houlsby(r=4), Pfeiffer(r=4), ParallelAdapter(r=4), LinAdapter(r=4)]
OUT = {"bert": "attention.output.dense", "gpt2": "attn.c_proj", "llama": "self_attn.o_proj",
       "vit": "attention.o_proj"}  # fmt: skip
DOWN = {"bert": "output.dense", "gpt2": "mlp.c_proj", "llama": "mlp.down_proj", "vit": "mlp.fc2"}
BLOCKS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers", "vit": "vit.layers"}


def by_site(piece):
    """Parameters by (block, whether it is attention's)."""
    levels = piece.levels
    return {(lv.site.depth, "attn.o" in lv.site.name): dict(lv.method.named_parameters()) for lv in levels}


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("act", list(ACTS))
def test_houlsby_and_pfeiffer_are_series_adapters(name, act):
    for method in (Houlsby(r=4, activation=act), Pfeiffer(r=4, activation=act)):
        model, oracle = base(name), base(name)
        piece = inlay.adapt(model, method, head=None)
        stir(piece)
        found = by_site(piece)
        assert len(found) == (6 if isinstance(method, Houlsby) else 3)
        for (depth, attention), p in found.items():
            path = f"{BLOCKS[name]}.{depth}.{(OUT if attention else DOWN)[name]}"
            then(oracle, path, lambda x, y, p=p: y + dense_bottleneck(p, y, ACTS[act]))
        inputs = batch(name)
        torch.testing.assert_close(model(**inputs).logits, oracle(**inputs).logits, atol=2e-5, rtol=2e-5)


def feed_forward(block, f):
    """BERT's second half of a block with f beside the feed-forward."""
    return lambda x: block.output.LayerNorm(block.output.dense(block.intermediate(x)) + f(x) + x)


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("learned", [False, True])
def test_parallel_adapter(name, learned):
    model, oracle = base(name), base(name)
    piece = inlay.adapt(model, ParallelAdapter(r=4, learned=learned), head=None)
    assert [level.site.entry is not None for level in piece.levels] == [name == "bert"] * 3
    stir(piece)
    for depth, level in enumerate(piece.levels):
        p = dict(level.method.named_parameters())
        assert ("s" in p) is learned
        s = p["s"] if learned else 4.0

        def f(x, p=p, s=s):
            return s * dense_bottleneck(p, x, torch.relu)

        if name == "bert":  # the sub-layer is two modules with a residual sum of their own
            block = blocks(name, oracle)[depth]
            block.feed_forward_chunk = feed_forward(block, f)
        else:
            then(oracle, f"{BLOCKS[name]}.{depth}.mlp", lambda x, y, f=f: y + f(x))
    inputs = batch(name)
    torch.testing.assert_close(model(**inputs).logits, oracle(**inputs).logits, atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
def test_lin_adapter(name):
    model, oracle = base(name), base(name)
    piece = inlay.adapt(model, LinAdapter(r=4), head=None)
    stir(piece)
    for depth, level in enumerate(piece.levels):
        p = dict(level.method.named_parameters())

        def g(x, y, p=p):
            return y + dense_bottleneck(p, layer_norm(y, p["gain"], p["shift"]), torch.relu)

        then(oracle, f"{BLOCKS[name]}.{depth}", g)
    inputs = batch(name)
    torch.testing.assert_close(model(**inputs).logits, oracle(**inputs).logits, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_pfeiffer_at_the_last_norm_reads_the_normalised_sum_and_writes_before_it():
    model, oracle = base("bert"), base("bert")
    piece = inlay.adapt(model, [NormTuning().on("norm2"), Pfeiffer(r=4).on("norm2")], head=None)
    stir(piece)
    adapters = [level for level in piece.levels if isinstance(level.method, Pfeiffer)]
    norms = {lv.site.key: lv.method.value for lv in piece.levels if isinstance(lv.method, NormTuning)}
    assert len(adapters) == 3
    assert len(norms) == 6
    oracle.load_state_dict(norms, strict=False)
    for block, level in zip(blocks("bert", oracle), adapters, strict=True):
        p = dict(level.method.named_parameters())

        def output(hidden, residual, part=block.output, p=p):
            z = part.dense(hidden) + residual
            return part.LayerNorm(z + dense_bottleneck(p, part.LayerNorm(z), torch.relu))

        block.output.forward = output
    inputs = batch("bert")
    torch.testing.assert_close(model(**inputs).logits, oracle(**inputs).logits, atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_start(name, method):
    inputs = batch(name)
    expected = base(name)(**inputs).logits
    for init, deviation in (("zero", 0.0), ("near", 0.05), ("bert", 0.2)):
        model, spec = base(name), method.replace(init=init)
        piece = inlay.adapt(model, spec)
        assert spec.starts_at_base is (init == "zero")
        difference = (model(**inputs).logits - expected).abs().max() / expected.abs().max()
        assert difference <= deviation
        assert bool(difference == 0) is spec.starts_at_base
        tensors = dict(piece.levels[0].method.named_parameters())
        assert (tensors["up_bias"] == 0).all()
        assert (tensors["down_bias"] == 0).all()
        if init == "near":
            assert max(tensors["up"].abs().max(), tensors["down"].abs().max()) <= 0.02


def test_spread_of_the_initial_values():
    model = nn.Sequential(nn.Linear(400, 400))
    for init, std in (("near", 0.0088), ("bert", 0.02)):  # N(0, 0.01²) cut at 2σ has a deviation of 0.0088
        p = inlay.adapt(model, Houlsby(r=200, init=init), where="0", head=None).levels[0].method
        for w in (p.down, p.up):
            assert abs(float(w.detach().std()) - std) < 0.03 * std
        inlay.detach(model)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_learns_and_leaves_the_base(name, method):
    model, inputs = base(name), batch(name)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    piece = inlay.adapt(model, method.replace(init="near"), head=None)
    target = torch.randn_like(model(**inputs).logits)
    optimizer = torch.optim.Adam(piece.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = (model(**inputs).logits - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in piece.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = {k: t for k, t in model.state_dict().items() if not k.startswith("inlay.")}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, Pfeiffer(r=4).on("norm2")], ids=repr)
@pytest.mark.parametrize("name", BASES)
def test_rows_go_to_their_own_adapters(name, method):
    model, inputs = base(name), batch(name)
    for i, adapter in enumerate("ab"):
        stir(inlay.adapt(model, method, name=adapter, head=None), seed=i)
    routes = ["a", None, "b", "a"]
    with inlay.route(model, routes):
        routed = model(**inputs).logits
    for i, adapter in enumerate(routes):
        inlay.use(model, *([adapter] if adapter else []))
        alone = model(**rows_of(inputs, [i])).logits
        torch.testing.assert_close(routed[i : i + 1], alone, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(routed[0], routed[1])


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_round_trip(name, method, tmp_path):
    model, inputs = base(name), batch(name)
    piece = inlay.adapt(model, method.replace(learned=True, activation="silu"))
    stir(piece)
    piece.save(tmp_path)
    again = base(name)
    loaded = inlay.load(again, tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert [str(level.method) for level in loaded.levels] == [str(level.method) for level in piece.levels]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_copies_are_apart(method):
    model, inputs = base("bert"), batch("bert")
    piece = inlay.adapt(model, method)
    stir(piece)
    expected = model(**inputs).logits
    twin = copy.deepcopy(model)
    stir(piece)
    assert torch.equal(twin(**inputs).logits, expected)
    assert not torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_with_a_method_that_acts_on_inputs_of_the_same_module():
    """In BERT the feed-forward's output module is where both end, but only one begins there."""
    inputs = batch("bert")
    expected = {}
    for order in ([0, 1], [1, 0]):
        model = base("bert")
        methods = [IA3().on("mlp.down"), ParallelAdapter(r=4)]
        pieces = [inlay.adapt(model, methods[i], name=str(i), head=None) for i in order]
        for piece in pieces:
            stir(piece, seed=int(piece.name))
        inlay.use(model, *(piece.name for piece in pieces))
        expected[tuple(order)] = model(**inputs).logits
        for i in (0, 1):
            inlay.use(model, str(i))
            alone = model(**inputs).logits
            assert not torch.allclose(alone, expected[tuple(order)], atol=1e-3)
    # scaling the input of the module and adding to its output commute
    torch.testing.assert_close(expected[0, 1], expected[1, 0], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_rows_through_a_module_with_both():
    model, inputs = base("bert"), batch("bert")
    stir(inlay.adapt(model, [IA3().on("mlp.down"), ParallelAdapter(r=4)], name="a", head=None))
    stir(inlay.adapt(model, [LoRA(r=2).on("mlp.down"), ParallelAdapter(r=4)], name="b", head=None))
    routes = ["b", "a", None, "a"]
    with inlay.route(model, routes):
        routed = model(**inputs).logits
    for i, adapter in enumerate(routes):
        inlay.use(model, *([adapter] if adapter else []))
        torch.testing.assert_close(routed[i : i + 1], model(**rows_of(inputs, [i])).logits, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_spans_let_go_of_what_entered():
    model = base("bert")
    inlay.adapt(model, ParallelAdapter(r=4))
    model(**batch("bert"))
    assert [span.value for span in model.inlay.spans.values()] == [None] * 3


@torch.no_grad()
def test_convolutions_have_their_features_in_channels():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    plain = model[0](x)
    piece = inlay.adapt(model, Houlsby(r=4, activation="tanh"), where="0", head=None)
    assert torch.equal(model(x), plain.relu())
    stir(piece)
    p = dict(piece.levels[0].method.named_parameters())
    flat = plain.permute(0, 2, 3, 1)
    expected = (flat + dense_bottleneck(p, flat, torch.tanh)).permute(0, 3, 1, 2).relu()
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_bfloat16_base(method):
    model, inputs = base("llama").to(torch.bfloat16), batch("llama")
    expected = model(**inputs).logits
    piece = inlay.adapt(model, method)
    assert {p.dtype for p in piece.parameters()} == {torch.float32}
    out = model(**inputs).logits
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_what_cannot_be_is_refused():
    with pytest.raises(SiteError, match="reads ids"):
        inlay.adapt(base("bert"), ParallelAdapter(), where="embed")
    with pytest.raises(SiteError, match="reads a map"):
        inlay.adapt(nn.Sequential(nn.Conv2d(3, 6, 3)), ParallelAdapter(), where="0", head=None)
    with pytest.raises(OptionError, match="must be one of 'relu', 'gelu'"):
        Houlsby(activation="swish")
    with pytest.raises(OptionError, match="at least 1"):
        Pfeiffer(r=0)
    model = base("bert")
    inlay.adapt(model, Houlsby())
    with pytest.raises(MergeError, match="acts on activations"):
        merge(model)
