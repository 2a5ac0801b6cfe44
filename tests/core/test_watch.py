"""What one pass over data sees: real tokens, every kind of module, gradients one by one, and nothing kept."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from calibration_bases import ALL, bert, equal, inputs_of, numbers, sentences
from torch import Tensor, nn

import inlay
from inlay.core.method import Method
from inlay.core.statistics import Components, Moment
from inlay.methods import EVA, CorDA, LoRA, LoRASB
from laws.benches import benches
from laws.cases import model_of
from laws.checks import gap


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ALL, ids=lambda m: m.label())
def test_padding_is_left_out(method: Method, side: str) -> None:
    """Rows one by one without padding, and together with it, give the same start."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=60
    )
    model = transformers.LlamaForCausalLM(config).eval()
    rows = [torch.randint(1, 60, (n,)) for n in (9, 5, 8)]
    lone = [{"input_ids": r[None], "labels": r[None]} for r in rows]
    ids, mask, labels = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9), torch.full((3, 9), -100)
    for i, r in enumerate(rows):
        where = slice(0, len(r)) if side == "right" else slice(9 - len(r), 9)
        ids[i, where], mask[i, where], labels[i, where] = r, 1, r
        labels[i, where.start] = -100  # nothing comes before it that could foretell it
    position = (mask.cumsum(1) - 1).clamp_min(0).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": position}

    def summed(output, batch) -> Tensor:
        shown = batch["labels"][:, 1:]
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), shown.flatten(), reduction="sum")

    found = []
    for batches in (lone, [batch]):
        adapter = inlay.adapt(model, method)
        inlay.calibrate(model, batches, loss=summed)
        deltas = [lv.method for lv in adapter.levels]
        made = [m.B0 @ m.A0 if isinstance(m, CorDA) else m.A.T @ m.A if isinstance(m, EVA) else m.delta().dense()
                for m in deltas]  # fmt: skip
        found.append([t.detach().clone() for t in made])
        inlay.detach(model)
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        assert gap(a, b) < 2e-3


def test_order_and_size_of_batches_do_not_matter_for_moments() -> None:
    X = torch.randn(50, 6)
    one, many = Moment(), Moment()
    one.add(X)
    for part in reversed(X.split(7)):
        many.add(part)
    torch.testing.assert_close(one.mean, many.mean)
    torch.testing.assert_close(one.mean, X.T @ X / 50)


@pytest.mark.parametrize("centred", [True, False])
def test_components_of_parts_are_those_of_the_whole(centred: bool) -> None:
    torch.manual_seed(0)
    X = torch.randn(400, 300) @ torch.diag(0.97 ** torch.arange(300)) + torch.randn(300)
    found = Components(5, 5, centred)
    for part in X.split(60):
        found.add(part)
    Y = (X - X.mean(0) if centred else X).double()
    _, S, Vh = torch.linalg.svd(Y, full_matrices=False)
    assert (found.components.double() @ Vh[:5].T).abs().diag().min() > 0.97
    torch.testing.assert_close(found.ratios, (S.square() / S.square().sum())[:5], atol=1e-3, rtol=0.03)
    assert found.vectors.shape == (15, 300), "what is kept does not grow"
    if centred:
        torch.testing.assert_close(found.mean, X.mean(0), atol=1e-4, rtol=1e-4)


def test_modules_with_the_same_input_share_a_statistic(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    add = Moment.add

    def counted(self: Moment, X: Tensor) -> None:
        nonlocal calls
        calls += 1
        add(self, X)

    monkeypatch.setattr(Moment, "add", counted)
    model, batches = bert(), sentences()
    inlay.adapt(model, CorDA(r=2), ("attn.q", "attn.k", "attn.v", "attn.o"))
    inlay.calibrate(model, batches)
    assert calls == 2 * 2 * len(batches), "of each block one for queries, keys and values, one for the output"


def test_convolutions_of_one_input_do_not_share_one() -> None:
    """A residual block's 3×3 and 1×1 kernels read the same map in patches of their own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.point, self.twin = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.point(x) + self.twin(x)

    x = torch.randn(4, 3, 6, 6)
    adapter = inlay.adapt(Block(), [CorDA(r=2), EVA(r=2, rho=1.0)], ("wide", "point", "twin"))
    inlay.calibrate(adapter.model, [x])
    wide, point, twin = (next(lv.method for lv in adapter.levels if lv.site.path == n and isinstance(lv.method, EVA))
                         for n in ("wide", "point", "twin"))  # fmt: skip
    assert (wide.A.shape, point.A.shape) == ((2, 27), (2, 3))
    assert torch.equal(point.A, twin.A)
    pixels = x.movedim(1, -1).reshape(-1, 3)
    Vh = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False).Vh
    assert (point.A @ Vh[:2].T).abs().diag().min() > 1 - 1e-4


def test_activations_do_not_outlive_their_batch() -> None:
    import weakref

    model, alive, most = bert(), weakref.WeakSet(), 0

    def watch(module: nn.Module, args: tuple) -> None:
        nonlocal most
        alive.add(args[0])
        most = max(most, len(alive))

    model.bert.encoder.layer[1].output.dense.register_forward_pre_hook(watch)
    inlay.adapt(model, [EVA(r=2, tau=1.0), CorDA(r=2), LoRASB(r=2)], "mlp.down")
    inlay.calibrate(model, sentences(4))
    assert most == 1


def test_only_one_gradient_of_the_base_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.core.statistics import Gradient

    model, add, seen = bert(), Gradient.add, []

    def watched(self: Gradient, gradient: Tensor) -> None:
        seen.append(sum(p.grad is not None for p in model.parameters()))
        add(self, gradient)

    monkeypatch.setattr(Gradient, "add", watched)
    inlay.adapt(model, LoRASB(r=2))
    inlay.calibrate(model, sentences(2))
    assert seen == [1] * 10 * 2
    assert all(p.grad is None for p in model.parameters())


def test_eva_stops_when_its_components_stand_still() -> None:
    model, batch = bert(), sentences(1)[0]
    inlay.adapt(model, EVA(r=2))
    assert inlay.calibrate(model, [batch] * 9).batches == 2
    inlay.detach(model)
    inlay.adapt(model, EVA(r=2, tau=1.0))
    assert inlay.calibrate(model, [batch] * 9).batches == 9


def test_other_parts_of_the_network_act_as_they_are() -> None:
    """An adapter below does; what is calibrated does not, however trained."""
    model, batches = bert(), sentences()
    inlay.adapt(model, LoRA(r=2), "block[0].mlp.up", name="below", head=None)
    with torch.no_grad():
        for p in model.inlay.adapters["below"].parameters():
            p.normal_()
    adapter = inlay.adapt(model, EVA(r=2, rho=1.0, tau=1.0), "block[1].attn.q", name="above", head=None)
    inlay.use(model, "below", "above")
    inlay.calibrate(model, batches)
    first = numbers(adapter)
    with torch.no_grad():
        for p in model.inlay.adapters["above"].parameters():
            p.normal_()
    inlay.calibrate(model, batches)
    assert equal(first, numbers(adapter)), "doing it again begins anew"
    inlay.use(model, "below")
    X = inputs_of(model, adapter.levels[0].site.path, batches)
    Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False).Vh
    assert (first[next(n for n in first if n.endswith(".A"))].double() @ Vh[:2].T).abs().diag().min() > 1 - 1e-5


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2)),
        lambda: nn.Conv2d(4, 6, 3, 1, 1, groups=2, padding_mode="reflect"),
        lambda: nn.Conv1d(4, 6, 3, 2, 2, 2),
    ],
    ids=["2d", "2d-groups", "1d"],
)
def test_convolutions_see_the_patches_under_their_kernel(conv: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = conv()
    x = torch.randn(3, 4, 7, 8) if isinstance(module, nn.Conv2d) else torch.randn(3, 4, 8)
    adapter = inlay.adapt(nn.Sequential(module), LoRA(r=2), "0")
    site = adapter.levels[0].site
    vectors = site.host.vectors(module, x)
    groups, rows = module.groups, site.weight.shape[0] // module.groups
    y = module(x).detach()
    plain = y - module.bias.detach().reshape(-1, *(1 for _ in range(y.dim() - 2)))
    per_group = vectors.reshape(len(x), groups, -1, site.d_in)
    for g in range(groups):
        W = site.weight[g * rows : (g + 1) * rows]
        there = (per_group[:, g] @ W.T).transpose(1, 2)
        torch.testing.assert_close(there, plain[:, g * rows : (g + 1) * rows].flatten(2), atol=1e-5, rtol=1e-4)
    method = inlay.adapt(nn.Sequential(conv()), EVA(r=2, rho=1.0), "0")
    inlay.calibrate(method.model, [x, x])
    assert method.levels[0].method.is_calibrated


@pytest.mark.parametrize("name", ["gpt2-qv", "mha", "mixtral", "gpt-oss", "conv2d-groups", "embedding"])
def test_gradients_wherever_the_matrix_is_stored(name: str) -> None:
    bench = benches()[name]
    model, inputs = model_of(bench), bench.feed()
    plain = model_of(bench).requires_grad_(True)
    goal = torch.randn_like(first_of(model(**inputs)))

    def error(output, batch) -> Tensor:
        return (first_of(output).float() - goal).square().mean()

    error(plain(**inputs), None).backward()
    adapter = inlay.adapt(model, LoRASB(r=2, eta=1.0, iterations=0), bench.where, head=None)
    inlay.calibrate(model, [inputs], loss=error)
    assert len(adapter.levels) == len(bench.slots)
    for level, slot in zip(adapter.levels, bench.slots, strict=True):
        twin = copy.deepcopy(plain)
        p, grad = slot.module(twin)._parameters[slot.param], slot.module(plain)._parameters[slot.param].grad
        p.data.copy_(grad)
        step = -slot.matrix(twin).sign()
        S = torch.linalg.svdvals(step)
        singular = level.method.R.diag().double()
        torch.testing.assert_close(singular, S[: len(singular)], atol=1e-3, rtol=1e-3)
        kept = level.method.B.double().T @ step @ level.method.A.double().T
        torch.testing.assert_close(kept.diag(), S[: len(singular)], atol=1e-3, rtol=1e-3)


def first_of(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_gradients_of_a_quantised_base() -> None:
    """W cannot have a gradient there: it is put together from what goes in and what comes back."""
    bench = benches()["nf4"]
    model, inputs = model_of(bench), bench.feed()
    adapter = inlay.adapt(model, LoRASB(r=2, eta=1.0), bench.where, head=None)
    inlay.calibrate(model, [inputs], loss=lambda output, batch: first_of(output).float().square().mean())
    assert all(level.method.is_calibrated for level in adapter.levels)
    level = adapter.levels[-1]
    plain = nn.Linear(level.site.d_in, level.site.d_out)
    seen: dict[str, Tensor] = {}
    inlay.detach(model)

    def grab(module: nn.Module, args: tuple, y: Tensor) -> None:
        seen["x"] = args[0].detach()
        y.requires_grad_() if not y.requires_grad else None
        y.register_hook(lambda g: seen.update(g=g))

    model.get_submodule(level.site.path).register_forward_hook(grab)
    first_of(model(**inputs)).float().square().mean().backward()
    plain(seen["x"].float()).backward(seen["g"].float())
    U, S, Vh = torch.linalg.svd(-plain.weight.grad.sign())
    assert gap((U[:, :2] * S[:2]) @ Vh[:2], level.method.delta().dense()) < 1e-3


def test_an_encoder_decoder_masks_its_encoder_alone() -> None:
    """The mask that is given speaks of the encoder's tokens, even where the decoder has as many."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=60, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 5:] = 0
    batch = {"input_ids": torch.randint(1, 60, (3, 9)), "attention_mask": mask, "labels": torch.randint(1, 60, (3, 9))}
    adapter = inlay.adapt(model, EVA(r=2), ("attn.q",))
    inlay.calibrate(model, [batch])
    seen = {level.site.name.partition(".")[0]: int(level.method.samples) for level in adapter.levels}
    assert seen == {"encoder": 23, "decoder": 27}
