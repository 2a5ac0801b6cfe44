"""What a calibration leaves: the network as it was, files that need no data; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from calibration_bases import ALL, bert, equal, numbers, sentences
from torch import Tensor, nn

import inlay
from inlay.core.active import attached
from inlay.core.errors import AdapterError, CalibrationError
from inlay.core.method import Method
from inlay.methods import EVA, CorDA, DeltaLoRA, DoRA, DyLoRA, LoRA, LoRASB
from laws.checks import anatomy_of, gap, same_anatomy, tensors


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.label())
def test_nothing_is_left_behind(method: Method) -> None:
    model, batches = bert().train(), sentences()
    model.bert.embeddings.eval()
    adapter = inlay.adapt(model, method)
    before, base, state = anatomy_of(model), tensors(model), torch.get_rng_state()
    inlay.calibrate(model, batches)
    same_anatomy(before, anatomy_of(model), "calibrating")
    assert all(p.grad is None for p in model.parameters()), "a gradient was left, which a first step would take"
    after = tensors(model)
    assert all(torch.equal(t, after[n]) for n, t in base.items())
    assert torch.equal(state, torch.get_rng_state())
    first = numbers(adapter)
    torch.manual_seed(99)
    inlay.calibrate(model, batches)
    assert equal(first, numbers(adapter)), "the same batches give the same start"


@pytest.mark.parametrize("method", [*ALL, DoRA(of=EVA(r=3))], ids=lambda m: m.label())
def test_loading_needs_no_data(method: Method, tmp_path) -> None:
    model, batches = bert(), sentences()
    adapter = inlay.adapt(model, method, ("attn.q", "mlp.up", "mlp.down"))
    assert "not calibrated" in str(adapter)
    inlay.calibrate(model, batches)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    adapter.save(str(tmp_path / "a"))
    fresh = bert()
    loaded = inlay.load(fresh, tmp_path / "a")
    assert "not calibrated" not in str(loaded)
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, fresh(**batches[0]).logits)
    assert loaded.adapter_parameters == adapter.adapter_parameters
    for level in loaded.levels:
        assert level.method.count(level.site) == sum(p.numel() for p in level.method.parameters())
    loaded.save(str(tmp_path / "b"))
    assert (tmp_path / "a/adapter.safetensors").stat().st_size == (tmp_path / "b/adapter.safetensors").stat().st_size


def test_a_place_may_be_left_with_no_rank(tmp_path) -> None:
    """One input varies along one direction only, the other along many: the first keeps little, maybe nothing."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"flat": nn.Linear(12, 6), "peak": nn.Linear(12, 6)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.parts["flat"](x) + self.parts["peak"](z)

    both = Both()
    x, z = torch.randn(400, 12), torch.randn(400, 12) * torch.tensor([2.0, 1.9] + [0.01] * 10)
    adapter = inlay.adapt(both, EVA(r=1), ("flat", "peak"))
    inlay.calibrate(both, [(x, z)])
    assert [len(lv.method.A) for lv in adapter.levels] == [0, 2]
    before = both(x, z).detach()
    loss = both(x, z).square().mean()
    loss.backward()
    torch.optim.AdamW(adapter.parameters(), lr=0.1).step()
    trained = both(x, z).detach()
    assert gap(before, trained) > 1e-3
    adapter.save(str(tmp_path))
    adapter.merge()
    assert gap(trained, both(x, z)) < 1e-5
    inlay.detach(both)
    inlay.load(both, tmp_path)
    assert torch.equal(trained, both(x, z).detach())


def test_optimizers_made_before_still_hold_the_tensors() -> None:
    model, batches = bert(), sentences()
    adapter = inlay.adapt(model, EVA(r=3), ("attn.q", "mlp.down"))
    shapes = [p.shape for p in adapter.parameters()]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    inlay.calibrate(model, batches)
    assert shapes != [p.shape for p in adapter.parameters()]
    before = numbers(adapter)
    for _ in range(2):
        model(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [n for n, t in numbers(adapter).items() if not torch.equal(t, before[n])]
    assert {n.rpartition(".")[2] for n in moved} >= {"A", "B"}


# ---------------------------------------------------------------------- refusals
def refused(model: nn.Module, batches, match: str, error: type[Exception] = CalibrationError) -> None:
    """The reason is given, and nothing has changed."""
    own = attached(model).adapters
    before, held = {n: t.clone() for n, t in own.state_dict().items() if isinstance(t, Tensor)}, anatomy_of(model)
    with pytest.raises(error, match=match):
        inlay.calibrate(model, batches)
    same_anatomy(held, anatomy_of(model), "a refused calibration")
    assert equal(before, {n: t for n, t in own.state_dict().items() if isinstance(t, Tensor)})


def test_refusals() -> None:
    model, batches = bert(), sentences()
    inlay.adapt(model, LoRA(r=2), name="lora")
    refused(model, batches, r"no active method starts from data \(active: LoRA, Head\)")
    inlay.adapt(model, [EVA(r=2), LoRASB(r=2)])
    refused(model, [], "no batch")
    refused(model, batches[0], "several batches: put a single one in a list")
    refused(model, sentences(labels=False), "give batches with labels")
    broken = [{**batches[0]}, {**batches[1], "inputs_embeds": torch.full((4, 9, 24), float("nan"))}]
    del broken[1]["input_ids"]
    refused(model, broken, "are not all finite")
    inlay.merge(model, "lora")
    with pytest.raises(AdapterError, match="unmerge before calibrating"):
        inlay.calibrate(model, batches)


def test_too_few_vectors_for_a_rank() -> None:
    model = bert()
    row = {"input_ids": torch.tensor([[5, 6, 7]])}
    for method in (EVA(r=3), CorDA(r=3), [CorDA(r=2), EVA(r=4)]):
        inlay.adapt(model, method)
        refused(model, [row], r"needs more than \d input vectors at '.*', the batches held 3: give more batches")
        inlay.detach(model)


def test_modules_that_no_batch_reaches() -> None:
    model = nn.ModuleDict({"used": nn.Linear(6, 6), "idle": nn.Linear(6, 6)})

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["used"](x)

    half = Half()
    inlay.adapt(half, EVA(r=2), ("used", "idle"))
    refused(half, [torch.randn(20, 6)], "never came through 'parts.idle', where EVA")
    inlay.detach(half)
    inlay.adapt(half, CorDA(r=2, damping=0.0), "used")
    refused(half, [torch.randn(20, 6) * torch.tensor([1.0, 1, 1, 1, 1, 0])], "C has no inverse")
    refused(half, [torch.zeros(20, 6)], "all zero")


def test_a_rank_that_an_outer_method_cannot_do_with_changes_nothing() -> None:
    """What is found out while methods are built again undoes all that was put in place before."""
    model = bert()
    inlay.adapt(model, DyLoRA(of=EVA(r=3), rank=3), ("attn.q", "attn.o", "mlp.up", "mlp.down"))
    refused(model, sentences(), "it cannot use 3", Exception)


def test_resized_tensors_come_back_from_a_snapshot() -> None:
    from inlay.train.state import load_into, snapshot

    model, batches, where = bert(), sentences(), ("attn.q", "mlp.down")
    adapter = inlay.adapt(model, DeltaLoRA(of=EVA(r=3)), where)
    inlay.calibrate(model, batches)
    kept = snapshot(model.inlay.adapters["default"])
    other = bert()
    fresh = inlay.adapt(other, DeltaLoRA(of=EVA(r=3)), where)
    assert [p.shape for p in fresh.parameters()] != [p.shape for p in adapter.parameters()]
    load_into(other.inlay.adapters["default"], kept)
    assert equal(numbers(adapter), numbers(fresh))
