"""AdapterDrop: fewer parameters, no backward below the lowest adapter, and one adapter that serves with any n."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hidden_bases import BASES, base, batch, blocks, stir

import inlay
from inlay.core.errors import OptionError, SiteError
from inlay.methods import Houlsby, LinAdapter, LoRA, ParallelAdapter, Pfeiffer
from inlay.methods.hidden.bottleneck import leave_out
from inlay.train.state import load_into, snapshot

METHODS = [Houlsby(r=4), Pfeiffer(r=4), ParallelAdapter(r=4), LinAdapter(r=4)]


def need_gradients(name, model, inputs) -> list[bool]:
    """Which blocks' outputs are part of the backward pass."""
    found = []
    watch = lambda module, args, output: found.append(output[0].requires_grad)
    handles = [block.register_forward_hook(watch) for block in blocks(name, model)]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_nothing_is_built_and_nothing_flows_back_below(name, method):
    model, inputs = base(name).train(), batch(name)
    whole = inlay.adapt(model, method, name="whole", head=None).adapter_parameters
    for n in (1, 2):
        piece = inlay.adapt(model, method.replace(drop=n), name=f"drop{n}", head=None)
        assert piece.adapter_parameters * 3 == whole * (3 - n)
        assert {level.site.depth for level in piece.levels} == set(range(n, 3))
        assert need_gradients(name, model, inputs) == [i >= n for i in range(3)]


@pytest.mark.parametrize("name", BASES)
def test_dropped_blocks_save_nothing_for_backward(name):
    def saved(**options):
        model = base(name)
        inlay.adapt(model, Pfeiffer(r=4, **options), head=None)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(**batch(name))
        return len(sizes)

    counts = [saved(drop=n) for n in range(3)]
    assert counts[0] > counts[1] > counts[2]
    # blocks are alike: each one that is left out saves as much as the next
    assert abs((counts[0] - counts[1]) - (counts[1] - counts[2])) <= 2


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_robust_draws_once_per_step_for_all_sites(name):
    model, inputs = base(name).train(), batch(name)
    piece = inlay.adapt(model, Houlsby(r=4, robust=True), head=None)
    assert piece.adapter_parameters == inlay.adapt(base(name), Houlsby(r=4), head=None).adapter_parameters
    assert need_gradients(name, model, inputs) == [True] * 3  # before the first step
    drawn = Counter()
    for step in range(300):
        inlay.step(model, step / 300)
        (n,) = {level.method.depth.of(level.method.blocks) for level in piece.levels}
        drawn[n] += 1
        if step < 8:
            assert need_gradients(name, model, inputs) == [i >= n for i in range(3)]
    assert set(drawn) == {0, 1, 2}
    assert min(drawn.values()) > 70  # 100 ± 8 of each are expected
    model.eval()
    assert need_gradients(name, model, inputs) == [True] * 3


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
def test_any_number_can_be_left_out_at_inference(name):
    model, inputs = base(name), batch(name)
    piece = inlay.adapt(model, Houlsby(r=4, robust=True), head=None)
    stir(piece)
    for n in (2, 0, 1, 3):
        leave_out(piece, n)
        shallow = base(name)
        if n < 3:
            other = inlay.adapt(shallow, Houlsby(r=4, drop=n), head=None)
            for level, same in zip([lv for lv in piece.levels if lv.site.depth >= n], other.levels, strict=True):
                same.method.load_state_dict(level.method.state_dict(), strict=False)
        assert torch.equal(model(**inputs).logits, shallow(**inputs).logits)


@torch.no_grad()
def test_the_chosen_number_is_saved_with_the_adapter(tmp_path):
    model, inputs = base("bert"), batch("bert")
    piece = inlay.adapt(model, Houlsby(r=4, robust=True))
    stir(piece)
    leave_out(piece, 1)
    piece.save(tmp_path)
    again = base("bert")
    loaded = inlay.load(again, tmp_path)
    expected = model(**inputs).logits
    assert torch.equal(again(**inputs).logits, expected)
    leave_out(loaded, 0)
    assert not torch.equal(again(**inputs).logits, expected)


def test_an_interrupted_run_goes_on_with_its_draws():
    def draws(model, piece, n):
        for _ in range(n):
            inlay.step(model, 0.0)
            yield piece.levels[0].method.depth.of(3)

    model = base("bert")
    piece = inlay.adapt(model, Pfeiffer(r=4, robust=True), head=None)
    list(draws(model, piece, 5))
    state = snapshot(model.inlay.adapters["default"])
    expected = list(draws(model, piece, 20))
    assert len(set(expected)) == 3
    again = base("bert")
    other = inlay.adapt(again, Pfeiffer(r=4, robust=True), head=None)
    load_into(again.inlay.adapters["default"], state)
    assert list(draws(again, other, 20)) == expected


def test_towers_count_their_own_blocks():
    from transformers import BartConfig, BartModel

    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 16, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}  # fmt: skip
    model = BartModel(BartConfig(encoder_layers=4, decoder_layers=2, **sizes))
    piece = inlay.adapt(model, Pfeiffer(r=4, robust=True))
    assert [level.method.blocks for level in piece.levels] == [4] * 4 + [2] * 2
    inlay.delete(model, "default")
    piece = inlay.adapt(model, Pfeiffer(r=4, drop=1))
    assert [level.site.name for level in piece.levels] == [
        *(f"encoder.block[{i}].mlp.down" for i in (1, 2, 3)), "decoder.block[1].mlp.down"
    ]  # fmt: skip


def test_what_cannot_be_is_refused():
    with pytest.raises(SiteError, match="finds nothing to act on"):
        inlay.adapt(base("bert"), Houlsby(drop=3))
    with pytest.raises(SiteError, match="is in no block"):
        inlay.adapt(base("bert"), Houlsby(drop=1), where=["embed", "mlp.down"])
    with pytest.raises(OptionError, match="has no bottleneck"):
        leave_out(inlay.adapt(base("bert"), LoRA(), head=None), 1)
