"""LoReFT and DiReFT against row-by-row computations, and the places and moments at which they act."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hidden_bases import BASES, base, batch, blocks, rows_of, stir

import inlay
from inlay.core.errors import AdapterError, OptionError, SiteError
from inlay.core.positions import directions, prompts
from inlay.methods import ConsReFT, DiReFT, LobiReFT, LoReFT, NoReFT

METHODS = [LoReFT(r=3, positions="f2+l3"), DiReFT(r=3, positions="f2+l3")]
ABLATIONS = [
    NoReFT(r=3, positions="f2+l3"), ConsReFT(r=3, positions="f2+l3"), LobiReFT(r=3, positions="f2+l3", tied=False),
    LoReFT(r=3, positions="f2+l3", difference=False), LoReFT(r=3, positions="f2+l3", activation="relu"),
    NoReFT(r=3, positions="all", activation="tanh"), DiReFT(r=3, positions="f2+l3", activation="gelu"),
]  # fmt: skip
UNTIED = [method.replace(tied=False) for method in METHODS]
EVERYWHERE = [method.replace(positions="all") for method in METHODS]


def outputs(name, model, inputs):
    """The output of every block."""
    found = []
    handles = [
        b.register_forward_hook(lambda m, a, out: found.append(out if isinstance(out, torch.Tensor) else out[0]))
        for b in blocks(name, model)
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def edited(method, p, h, ends):
    """Φ of one vector, from the equations; `ends` says whether it is of the prefix (0) or of the suffix (1)."""
    i = 0 if method.tied else ends
    sigma = {"identity": lambda z: z, "relu": torch.relu, "tanh": torch.tanh, "gelu": F.gelu}
    sigma = sigma[method.fields().get("activation", "identity")]
    if isinstance(method, DiReFT | NoReFT):
        z = sigma(p["W1"][i] @ h + p["b"][i])
        return h + p["W2"][i].T @ (z - p["W2"][i] @ h if isinstance(method, NoReFT) else z)
    rows = []  # R by Gram and Schmidt
    for a in p["A"][i].double():
        for row in rows:
            a = a - (a @ row) * row
        rows.append(a / a.norm())
    R = torch.stack(rows).float()
    if isinstance(method, LobiReFT):
        return h + R.T @ p["b"][i]
    z = p["b"][i] if isinstance(method, ConsReFT) else sigma(p["W"][i] @ h + p["b"][i])
    return h + R.T @ (z - R @ h if isinstance(method, ConsReFT) or method.difference else z)


def places(method, real, prompt=None):
    """(index, end) of every position to be edited, in plain Python."""
    tokens = [i for i, r in enumerate(real) if r][:prompt]
    if method.positions == "all":
        return [(i, 0) for i in (range(len(real)) if prompt is None else tokens)]
    half = len(tokens) // 2
    return [(i, 0) for i in tokens[: min(2, half)]] + [(i, 1) for i in tokens[len(tokens) - min(3, half) :]]


@torch.no_grad()
@pytest.mark.parametrize("method", ABLATIONS, ids=repr)
def test_ablations_edit_as_their_equations_say(method):
    test_chosen_positions_are_edited_and_no_other("bert", method)


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, *UNTIED, *EVERYWHERE], ids=repr)
@pytest.mark.parametrize("name", BASES)
def test_chosen_positions_are_edited_and_no_other(name, method):
    model, inputs = base(name), batch(name)
    plain = outputs(name, model, inputs)[0]
    piece = inlay.adapt(model, method, layers=[0], head=None)
    stir(piece)
    got = outputs(name, model, inputs)[0]
    p = dict(piece.levels[0].method.named_parameters())
    masks = inputs.get("attention_mask", torch.ones(plain.shape[:2]))
    for row, real in enumerate(masks.tolist()):
        there = dict(places(method, real))
        for i in range(len(real)):
            if i in there:
                expected = edited(method, p, plain[row, i], there[i])
                torch.testing.assert_close(got[row, i], expected, atol=2e-5, rtol=2e-5)
                assert not torch.allclose(got[row, i], plain[row, i], atol=1e-3)
            else:
                assert torch.equal(got[row, i], plain[row, i])


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, *UNTIED, *EVERYWHERE], ids=repr)
@pytest.mark.parametrize("name", BASES)
def test_start(name, method):
    inputs = batch(name)
    expected = base(name)(**inputs).logits
    model = base(name)
    inlay.adapt(model, method)
    assert method.starts_at_base
    assert torch.equal(model(**inputs).logits, expected)
    model, paper = base(name), method.replace(init="paper")
    piece = inlay.adapt(model, paper)
    assert not paper.starts_at_base
    assert (model(**inputs).logits - expected).abs().max() > 1e-3
    for key, t in piece.levels[0].method.named_parameters():
        if key != "A":
            assert 0.1 < t.abs().max() <= 0.25  # U(±1/√16)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_r_stays_orthonormal(name):
    model, inputs = base(name), batch(name)
    piece = inlay.adapt(model, LoReFT(r=4, positions="f2+l2", tied=False), head=None)
    start = piece.levels[0].method.R.detach().clone()
    optimizer = torch.optim.AdamW(piece.parameters(), lr=3e-2, weight_decay=0.1)
    target = torch.randn_like(model(**inputs).logits)
    losses = []
    for _ in range(40):
        loss = (model(**inputs).logits - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in piece.parameters())
        optimizer.step()
        optimizer.zero_grad()
        for level in piece.levels:
            R = level.method.R.detach()
            torch.testing.assert_close(R @ R.mT, torch.eye(4).expand(2, 4, 4), atol=1e-6, rtol=0)
    assert losses[-1] < 0.9 * losses[0]
    method = piece.levels[0].method
    assert (method.R.detach() - start).abs().max() > 0.1  # it did turn
    with torch.no_grad():  # what R sees of an edited state is W h + b; the rest is untouched
        h = torch.randn(5, 7, 16)
        maps = method.maps()
        M, b, N = maps.W[0] - maps.D[0], maps.b[0], maps.N[0]
        after = h + (h @ M.T + b) @ N
        torch.testing.assert_close(after @ N.T, h @ method.W[0].T + method.b[0], atol=1e-5, rtol=1e-5)
        across = torch.eye(16) - N.T @ N
        torch.testing.assert_close(after @ across, h @ across, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", [METHODS[0], ABLATIONS[1], METHODS[1]], ids=repr)
def test_directions_act_row_by_row_and_add_up(method):
    """Those of a row alone, those of all rows, and all of them, which is what acts outside of the context."""
    model, inputs = base("bert"), batch("bert")
    plain = outputs("bert", model, inputs)[0]
    piece = inlay.adapt(model, method, layers=[0], head=None)
    stir(piece)
    whole = outputs("bert", model, inputs)[0]
    found = []
    for chosen in ([0], [1, 2], [0, 1, 2]):
        with directions(model, chosen):
            found.append(outputs("bert", model, inputs)[0])
    assert torch.equal(found[2], whole)
    torch.testing.assert_close(found[0] + found[1] - plain, whole, atol=1e-5, rtol=1e-5)
    assert (found[0] - whole).abs().max() > 1e-2
    rows = [[1, 2], [0]] * (len(plain) // 2)
    with directions(model, rows):
        mixed = outputs("bert", model, inputs)[0]
    for i in range(len(mixed)):
        torch.testing.assert_close(mixed[i], found[1 - i % 2][i], atol=1e-6, rtol=1e-6)
    assert torch.equal(outputs("bert", model, inputs)[0], whole)
    with directions(model, [3]), pytest.raises(OptionError, match="has directions 0 to 2, asked for is 3"):
        model(**inputs)
    with pytest.raises(AdapterError, match="rows of directions were given"), directions(model, [[0]] * 5):
        model(**inputs)


def test_directions_are_trained_apart():
    """Training some directions leaves those of another task as they are, but for R, whose rows stay orthonormal."""
    model, inputs = base("bert"), batch("bert")
    method = inlay.adapt(model, METHODS[0], layers=[0], head=None).levels[0].method
    with directions(model, [0, 1]):
        model(**inputs).logits.square().sum().backward()
    assert method.W.grad[0, 2].eq(0).all()
    assert method.b.grad[0, 2] == 0
    assert method.W.grad[0, :2].abs().amax(1).gt(0).all()


def pad(ids: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    """Rows padded on one side, with the position ids that unpadded rows would have."""
    longest = max(map(len, ids))
    rows = [[0] * (longest - len(r)) + r if side == "left" else r + [0] * (longest - len(r)) for r in ids]
    out = torch.tensor(rows)
    mask = (out != 0).long()
    return {"input_ids": out, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


IDS = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15], [16, 17], [18, 19, 20, 21, 22, 23]]


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, *UNTIED], ids=repr)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_on_either_side_changes_nothing(name, method):
    model = base(name)
    stir(inlay.adapt(model, method))
    left, right = pad(IDS, "left"), pad(IDS, "right")
    logits = [model(**inputs).logits[inputs["attention_mask"].bool()] for inputs in (left, right)]
    alone = torch.cat([model(torch.tensor([row])).logits[0] for row in IDS])
    torch.testing.assert_close(logits[0], alone, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(logits[1], alone, atol=2e-5, rtol=2e-5)
    positional = model(left["input_ids"], **{k: t for k, t in left.items() if k != "input_ids"}).logits
    assert torch.equal(positional[left["attention_mask"].bool()], logits[0])


def test_masks_that_are_passed_by_position_count():
    model, inputs = base("bert"), batch("bert")
    stir(inlay.adapt(model, METHODS[0]))
    assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"]).logits, model(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, *UNTIED, *EVERYWHERE], ids=repr)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_edits_the_prompt_only(name, method):
    """Generated with a cache, with a static one, without one, and by hand from the first forward pass."""
    model = base(name)
    piece = inlay.adapt(model, method)
    stir(piece, 0.5)
    inputs = {k: t for k, t in pad(IDS, "left").items() if k != "position_ids"}
    lengths = inputs["attention_mask"].sum(1)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**inputs, **options)
    static = model.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
    with prompts(model, lengths):
        plain = model.generate(**inputs, **options, use_cache=False)
        beams = model.generate(**inputs, **options, use_cache=False, num_beams=2)
    assert torch.equal(cached, plain)
    assert torch.equal(cached, static)
    assert torch.equal(beams, model.generate(**inputs, **options, num_beams=2))
    # scoring the generated text in one pass is the same, when it is said where the prompts end …
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, 10, dtype=torch.long)], 1)
    scored = {"input_ids": cached, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with prompts(model, lengths):
        logits = model(**scored).logits
    assert torch.equal(logits[:, 7:-1].argmax(-1), cached[:, 8:])
    # … or when labels say it
    labels = cached.clone()
    labels[:, :8] = -100
    torch.testing.assert_close(model(**scored, labels=labels).logits, logits)
    if method.positions != "all":
        assert not torch.allclose(model(**scored).logits, logits, atol=1e-3)
    with inlay.disabled(model):
        assert not torch.equal(model.generate(**inputs, **options), cached)


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, *UNTIED, *EVERYWHERE], ids=repr)
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
        torch.testing.assert_close(routed[i : i + 1], model(**rows_of(inputs, [i])).logits, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(routed[0], routed[1])


@torch.no_grad()
def test_rows_with_prompts_of_their_own():
    model = base("llama")
    for i, adapter in enumerate("ab"):
        stir(inlay.adapt(model, METHODS[0], name=adapter), seed=i)
    inputs, lengths, routes = pad(IDS, "right"), [5, 2, 1, 4], ["b", "a", None, "b"]
    with inlay.route(model, routes), prompts(model, lengths):
        routed = model(**inputs).logits
    for i, adapter in enumerate(routes):
        inlay.use(model, *([adapter] if adapter else []))
        with prompts(model, lengths[i]):
            alone = model(**rows_of(inputs, [i])).logits
        real = inputs["attention_mask"][i].bool()
        torch.testing.assert_close(routed[i][real], alone[0][real], atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, *UNTIED, *EVERYWHERE], ids=repr)
@pytest.mark.parametrize("name", BASES)
def test_round_trip_and_copies(name, method, tmp_path):
    model, inputs = base(name), batch(name)
    piece = inlay.adapt(model, method)
    stir(piece)
    expected = model(**inputs).logits
    piece.save(tmp_path)
    again = base(name)
    inlay.load(again, tmp_path)
    assert torch.equal(again(**inputs).logits, expected)
    twin = copy.deepcopy(model)
    stir(piece)
    assert torch.equal(twin(**inputs).logits, expected)
    assert not torch.equal(model(**inputs).logits, expected)
    state = model.state_dict()
    twin.load_state_dict(state)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS, *EVERYWHERE], ids=repr)
def test_bfloat16_base(method):
    model, inputs = base("llama").to(torch.bfloat16), batch("llama")
    expected = model(**inputs).logits
    piece = inlay.adapt(model, method)
    assert torch.equal(model(**inputs).logits, expected)
    stir(piece)
    out = model(**inputs).logits
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out, expected)


def test_only_chosen_positions_are_kept_for_backward():
    def saved(positions):
        model, inputs = base("llama"), batch("llama", rows=8, length=40)
        plain = []
        inlay.adapt(model, LoReFT(r=2, positions=positions), layers=[2])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: plain.append(t) or t, lambda t: t):
            model.model(**inputs)
        unique = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain if t.is_floating_point()}
        return sum(unique.values())

    # the final norm behind the block saves the same for both
    assert saved("f1+l1") < 0.75 * saved("all")


def test_an_encoder_reads_the_prompt():
    from transformers import T5Config, T5Model

    model = T5Model(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0,
                             decoder_start_token_id=0))  # fmt: skip
    piece = inlay.adapt(model, METHODS[0])
    assert [level.site.name for level in piece.levels] == ["encoder.block[0]", "encoder.block[1]"]
    stir(piece)
    ids = torch.randint(3, 40, (2, 6))
    with inlay.disabled(model):
        plain = model(input_ids=ids, decoder_input_ids=ids[:, :2]).last_hidden_state
    assert not torch.allclose(model(input_ids=ids, decoder_input_ids=ids[:, :2]).last_hidden_state, plain)


def test_the_mask_of_a_text_is_not_that_of_its_image():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = CLIPModel(CLIPConfig(text_config={**sizes, "vocab_size": 40, "eos_token_id": 2},
                                 vision_config={**sizes, "image_size": 8, "patch_size": 4})).eval()  # fmt: skip
    stir(inlay.adapt(model, METHODS[0], where="vision.block"))
    pixels = torch.randn(2, 3, 8, 8)
    ids = torch.tensor([[5, 6, 7, 8, 2], [5, 6, 2, 0, 0]])  # as many tokens as the image has patches and class
    images = [
        model(input_ids=ids, attention_mask=mask, pixel_values=pixels).image_embeds
        for mask in ((ids != 0).long(), torch.ones_like(ids))
    ]
    assert torch.equal(*images)


def test_what_cannot_be_is_refused():
    from torch import nn

    with pytest.raises(OptionError, match="tied=False needs both ends"):
        LoReFT(positions="f3", tied=False)
    with pytest.raises(OptionError, match="are not understood"):
        DiReFT(positions="first")
    with pytest.raises(SiteError, match="gives a map: name a block"):
        inlay.adapt(nn.Sequential(nn.Conv2d(3, 6, 3)), LoReFT(), where="0", head=None)
    model = nn.Sequential(nn.Linear(4, 4))
    inlay.adapt(model, LoReFT(r=2), where="0", head=None)
    with pytest.raises(SiteError, match=r"needs \(batch, tokens, features\), got \(2, 4\)"):
        model(torch.randn(2, 4))
