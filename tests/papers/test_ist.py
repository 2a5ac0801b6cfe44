"""IST: what is not drawn is not moved, by momentum either; what a block is worth follows from losses alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import inlay
from inlay.core.errors import AdapterError, OptionError, SiteError
from inlay.methods import IST, AdaLoRA, BitFit, DoRA, LoRA, Pfeiffer, PromptTuning, VBLoRA

BLOCKS = 8


def bert(blocks: int = BLOCKS) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=blocks, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).train()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(50, (8, 12)), "labels": torch.randint(2, (8,))}


def adapted(*methods: Any) -> tuple[nn.Module, inlay.Adapter, IST]:
    model = bert()
    adapter = inlay.adapt(model, list(methods))
    ist = model.inlay.adapters["default"]["ist"]
    assert isinstance(ist, IST)
    return model, adapter, ist


def by_block(adapter: inlay.Adapter) -> dict[int | None, list[nn.Parameter]]:
    found: dict[int | None, list[nn.Parameter]] = {}
    for level in adapter.levels:
        found.setdefault(None if level.head else level.site.depth, []).extend(level.method.parameters())
    return found


def step(model: nn.Module, optimizer: torch.optim.Optimizer, progress: float = 0.5, to_none: bool = True) -> None:
    feed = batch()
    loss = model(**feed).loss + inlay.penalty(model)
    loss.backward()
    optimizer.step()
    inlay.step(model, progress, optimizer, lambda: model(**feed).loss)
    optimizer.zero_grad(set_to_none=to_none)


# ---------------------------------------------------------------------- which blocks move
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("methods", [[LoRA(r=2)], [DoRA(of=LoRA(r=2))], [Pfeiffer(r=2), BitFit()]])
def test_blocks_that_are_not_drawn_are_left_alone(methods: list[Any], to_none: bool) -> None:
    """No tensor, no moment and no count of theirs moves, though AdamW has momentum and decay for them."""
    model, adapter, ist = adapted(*methods, IST(every=4))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, weight_decay=0.1)
    owned, trained = by_block(adapter), Counter[int]()
    for _ in range(30):
        drawn = ist.chosen()
        before = {p: (p.detach().clone(), {k: t.clone() for k, t in optimizer.state[p].items()})
                  for p in adapter.parameters()}  # fmt: skip
        step(model, optimizer, to_none=to_none)
        for depth, tensors in owned.items():
            moves = depth is None or depth in drawn
            for p in tensors:
                old, state = before[p]
                assert moves or torch.equal(p, old)
                now = optimizer.state[p]
                assert moves or (now.keys() == state.keys() and all(torch.equal(now[k], state[k]) for k in now))
            assert not moves or any(not torch.equal(p, before[p][0]) for p in tensors)
        trained.update(drawn)
    assert set(trained) == set(range(BLOCKS)), "every block has its turns"
    assert sum(trained.values()) == 30 * BLOCKS // 4


def test_prompts_and_the_head_are_always_trained() -> None:
    model, adapter, _ = adapted(LoRA(r=2), PromptTuning(tokens=2), IST())
    always = [p for level in adapter.levels if level.site.depth is None for p in level.method.parameters()]
    assert always
    for _ in range(5):
        model(**batch()).loss.backward()
        assert all(p.grad is not None for p in always)
        model.zero_grad()


def test_blocks_are_drawn_in_proportion() -> None:
    """σ(−I): the same for all at first; a block of low importance comes up more often."""
    _, _, ist = adapted(LoRA(r=2), IST(share=0.125))
    ist.importance[2] = -math.log(3)  # σ(log 3) = ¾ against ½
    counts = Counter[int]()
    for ist.steps in range(4000):
        counts.update(ist.chosen())
    expected = {i: 4000 * (1.5 if i == 2 else 1.0) / (BLOCKS + 0.5) for i in range(BLOCKS)}
    for i in range(BLOCKS):
        assert abs(counts[i] - expected[i]) < 4 * expected[i] ** 0.5


# ---------------------------------------------------------------------- what a block is worth
def test_importance_follows_from_losses_alone() -> None:
    """The update written out; softened blocks act at a quarter of their strength, in evaluation mode."""
    model, adapter, ist = adapted(LoRA(r=2, dropout=0.5), IST(every=1, rate=3.0))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    ist.importance = [0.1 * i for i in range(BLOCKS)]
    ist.step(0.5, None)
    sets = ist.some([1 / (1 + math.exp(-i)) for i in ist.importance])
    assert len(sets) == 3
    assert all(len(set(chosen)) == BLOCKS // 2 for chosen in sets)
    ist.steps = 0

    wanted, rewards, feed = list(ist.importance), [], batch()
    for chosen in sets:
        plain = bert().eval()
        plain.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            for level in adapter.levels:
                if level.head:
                    plain.get_submodule(level.site.path)._parameters[level.site.param].copy_(level.method.value)
                else:
                    share = 0.25 if level.site.depth in chosen else 1.0
                    plain.get_submodule(level.site.path).weight.add_(share * level.method.delta().dense())
            rewards.append(math.exp(-plain(**feed).loss.item()))
    for chosen, reward in zip(sets, rewards, strict=True):
        for i in chosen:
            odds = 1 / (1 + math.exp(-0.1 * i))
            wanted[i] += 3.0 * (reward - sum(rewards) / 3) * odds * (1 - odds)
    inlay.step(model, 0.5, None, lambda: model(**feed).loss)
    assert ist.importance == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert ist.importance != pytest.approx([0.1 * i for i in range(BLOCKS)], abs=1e-4)
    assert model.training, "modes are as they were"
    assert all(level.method.strength == 1.0 for level in adapter.levels)


@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(of=LoRA(r=2)), BitFit(), Pfeiffer(r=2)])
def test_strength_goes_from_the_base_to_the_adapter(method: Any) -> None:
    model, adapter, ist = adapted(method, IST())
    model.eval()
    feed = batch()
    with torch.no_grad():
        for level in adapter.levels:
            for p in () if level.head else level.method.parameters():
                p.add_(0.3 * torch.randn_like(p))

        def logits(strength: float) -> Tensor:
            for block in ist.blocks:
                block.strengthen(strength)
            return model(**feed).logits

        whole, none, half = logits(1.0), logits(0.0), logits(0.5)
        outside = [level for level in adapter.levels if level.site.depth is None and not level.head]
        for level in outside:
            level.method.strength = 0.0
        with inlay.disabled(model):
            base = model(**feed).logits
        torch.testing.assert_close(logits(0.0), base, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, half, atol=1e-4)
    assert not torch.allclose(half, none, atol=1e-4)


def test_blocks_that_are_missed_are_trained_more_often() -> None:
    """The effect: only block 5 helps the loss, so softening it hurts, its I falls and it is drawn more often."""
    model, _, ist = adapted(LoRA(r=2), IST())

    def loss() -> float:
        return 1.0 if ist.blocks[5].methods[0].strength < 1 else 0.5

    for _ in range(400):
        inlay.step(model, 0.5, None, loss)
    assert ist.importance[5] == min(ist.importance)
    assert ist.importance[5] < -0.5
    drawn = Counter(i for ist.steps in range(2000) for i in ist.chosen())
    assert drawn.most_common(1)[0][0] == 5


# ---------------------------------------------------------------------- what it asks for, and refuses
def test_it_wants_a_loss() -> None:
    model, _, _ = adapted(LoRA(r=2), IST(every=2))
    inlay.step(model, 0.1)
    with pytest.raises(AdapterError, match=r"loss=lambda"):
        inlay.step(model, 0.2)


def test_it_wants_methods_in_blocks() -> None:
    for methods in ([IST()], [PromptTuning(tokens=2), IST()]):
        with pytest.raises(SiteError, match=r"\[LoRA\(\), IST\(\)\]"):
            inlay.adapt(bert(), methods)
    with pytest.raises(OptionError, match="no places of its own"):
        inlay.adapt(bert(), [LoRA(r=2), IST().on("attn.q")])
    with pytest.raises(SiteError, match="one tensor for all"):
        inlay.adapt(bert(), [VBLoRA(r=2, vectors=4, length=4), IST()])


def test_with_adalora_only_what_trains_is_weighed() -> None:
    model, adapter, ist = adapted(AdaLoRA(r=3, target=2), IST(every=3))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for k in range(8):
        drawn = ist.chosen()
        before = {lv: lv.method.sensitivity_E.clone() for lv in adapter.levels if not lv.head}
        step(model, optimizer, (k + 1) / 8)
        for level, old in before.items():
            assert torch.equal(level.method.sensitivity_E, old) == (level.site.depth not in drawn)


def test_a_saved_adapter_is_what_was_trained(tmp_path: Any) -> None:
    model, adapter, _ = adapted(LoRA(r=2), IST(every=2))
    optimizer = inlay.optimizer(adapter, 0.01)
    for _ in range(6):
        step(model, optimizer)
    adapter.save(str(tmp_path))
    fresh = bert()
    loaded = inlay.load(fresh, str(tmp_path))
    assert [type(level.method).__name__ for level in loaded.levels if not level.head] == ["LoRA"] * 2 * BLOCKS
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**batch()).logits, model.eval()(**batch()).logits)
    fresh.train()(**batch()).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters()), "and can be trained on as such"
    assert "IST" not in repr(loaded)
    adapter.merge()


def test_compiled() -> None:
    """A compiled forward cannot ask for gradients anew; from the second step on they are those that were drawn."""
    model, adapter, ist = adapted(LoRA(r=2), IST())
    compiled, optimizer = torch.compile(model, backend="eager"), inlay.optimizer(adapter, 0.01)
    owned = by_block(adapter)
    for k in range(3):
        drawn = ist.chosen()
        compiled(**batch()).loss.backward()
        with_gradients = {depth for depth, ps in owned.items() if depth is not None and ps[0].grad is not None}
        assert with_gradients == (drawn if k else set(range(BLOCKS)))
        optimizer.step()
        inlay.step(model, (k + 1) / 3, optimizer)
        optimizer.zero_grad()


def test_decoder_and_encoder_blocks_are_told_apart() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(config)
    inlay.adapt(model, [LoRA(r=2), IST()])
    assert len(model.inlay.adapters["default"]["ist"].blocks) == 4
