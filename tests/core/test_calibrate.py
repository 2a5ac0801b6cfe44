"""One pass over data: what it sees, leaves and refuses. Expected values are computed from plain tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import inlay
from inlay.core import calibrate as core
from inlay.core.adapter import attached
from inlay.core.errors import AdapterError, CalibrationError, SiteError
from inlay.core.method import Method
from inlay.core.statistics import Calibrated, Components, Moment
from inlay.methods import EVA, CorDA, DeltaLoRA, DoRA, DyLoRA, LoRA, LoRASB, ReLoRA
from laws.benches import benches
from laws.cases import model_of
from laws.checks import anatomy_of, gap, same_anatomy, tensors

Batches = list[dict[str, Tensor]]
ALL = [EVA(r=3), CorDA(r=3), CorDA(r=3, mode="knowledge"), LoRASB(r=3)]
QV = ("attn.q", "attn.v")


def bert() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def sentences(count: int = 3, labels: bool = True) -> Batches:
    """Batches of four rows, two of them padded."""
    generator, made = torch.Generator().manual_seed(2), []
    for _ in range(count):
        mask = torch.ones(4, 9, dtype=torch.long)
        mask[0, 5:] = mask[2, 7:] = 0
        batch = {"input_ids": torch.randint(1, 60, (4, 9), generator=generator), "attention_mask": mask}
        made.append(batch | ({"labels": torch.randint(0, 3, (4,), generator=generator)} if labels else {}))
    return made


def inputs_of(model: nn.Module, path: str, batches: Batches) -> Tensor:
    """What real tokens bring to a module, (n, d), collected from a plain model."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches, strict=True)]).double()


def gradient_of(model: nn.Module, path: str, batches: Batches, name: str = "weight") -> Tensor:
    """The summed gradient of a tensor, from a plain model."""
    plain = copy.deepcopy(model).requires_grad_(True)
    for batch in batches:
        plain(**batch).loss.backward()
    grad = plain.get_submodule(path)._parameters[name].grad
    assert grad is not None
    return grad


def numbers(adapter: inlay.Adapter) -> dict[str, Tensor]:
    own = attached(adapter.model).adapters[adapter.name]
    return {n: t.clone() for n, t in own.state_dict().items() if isinstance(t, Tensor)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def at(adapter: inlay.Adapter, path: str) -> Method:
    return next(lv.method for lv in adapter.levels if lv.site.path.endswith(path))


# ---------------------------------------------------------------------- what the methods start from
def test_eva_is_the_principal_components_of_the_inputs() -> None:
    model, batches = bert(), sentences()
    adapter = inlay.adapt(model, EVA(r=3, rho=1.0, tau=1.0), QV)
    inlay.calibrate(model, batches)
    for level in adapter.levels[:-2]:
        X = inputs_of(bert(), level.site.path, batches)
        _, _, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
        A = level.method.A.detach().double()
        torch.testing.assert_close((A @ Vh[:3].T).abs(), torch.eye(3).double(), atol=1e-2, rtol=0)
        torch.testing.assert_close(A @ A.T, torch.eye(3).double(), atol=1e-5, rtol=0)
        assert not level.method.B.any()
        assert int(level.method.samples) == len(X) == 3 * 30


def test_eva_not_centred_takes_the_inputs_as_they_are() -> None:
    model, batches = bert(), sentences()
    adapter = inlay.adapt(model, EVA(r=2, rho=1.0, tau=1.0, centred=False), "block[1].attn.q")
    inlay.calibrate(model, batches)
    X = inputs_of(bert(), adapter.levels[0].site.path, batches)
    Vh = torch.linalg.svd(X, full_matrices=False).Vh
    assert (adapter.levels[0].method.A.detach().double() @ Vh[:2].T).abs().diag().min() > 1 - 1e-4


def test_eva_shares_ranks_out_by_explained_variance() -> None:
    model, batches, where = bert(), sentences(), ("attn.q", "attn.o", "mlp.up", "mlp.down")
    adapter = inlay.adapt(model, EVA(r=4, rho=2.0, tau=1.0), where)
    inlay.calibrate(model, batches)
    levels = [lv for lv in adapter.levels if not lv.head]
    explained = []
    for level in levels:
        X = inputs_of(bert(), level.site.path, batches)
        squares = torch.linalg.svdvals(X - X.mean(0)).square()
        explained.append((squares / squares.sum())[:8])
    bar = torch.cat(explained).sort(descending=True).values[4 * len(levels) - 1]
    expected = [int((part >= bar).sum()) for part in explained]
    assert [len(lv.method.A) for lv in levels] == expected
    assert sum(expected) == 4 * len(levels)
    assert len(set(expected)) > 1, "a test of sharing needs places that differ"
    assert all(lv.method.scale == 8 / 4 for lv in levels), "the scale is that of the rank asked for"


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_corda_is_the_split_of_the_weights_in_the_inputs_metric(mode: str) -> None:
    model, batches = bert(), sentences()
    adapter = inlay.adapt(model, CorDA(r=3, alpha=5, mode=mode, damping=0.01), QV)
    inlay.calibrate(model, batches)
    for level in adapter.levels[:-2]:
        X, W = inputs_of(bert(), level.site.path, batches), level.site.weight.double()
        C = X.T @ X
        C += 0.01 * C.diagonal().mean() * torch.eye(len(C)).double()
        U, S, Vh = torch.linalg.svd(W @ C)
        part = slice(0, 3) if mode == "instruction" else slice(len(S) - 3, None)
        expected = (U[:, part] * S[part]) @ Vh[part] @ torch.linalg.inv(C)
        B, A = level.method.B0.double(), level.method.A0.double()
        assert gap(expected, level.method.scale * B @ A) < 1e-4
        assert torch.equal(level.method.A, level.method.A0)


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_corda_with_inputs_of_identity_covariance_is_a_split_of_w_alone(mode: str) -> None:
    """PiSSA's with the largest, MiLoRA's with the smallest; and that is what it is without data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9))
    method = inlay.adapt(model, CorDA(r=2, alpha=3, mode=mode, damping=0.0), "0").levels[0].method
    before = numbers_of(method)
    inlay.calibrate(model, [12**0.5 * torch.eye(12)[torch.randperm(12)]])
    U, S, Vh = torch.linalg.svd(model[0].weight.detach().double(), full_matrices=False)
    part = slice(0, 2) if mode == "instruction" else slice(7, 9)
    assert gap((U[:, part] * S[part]) @ Vh[part], method.scale * method.B0.double() @ method.A0.double()) < 1e-5
    for name in ("A", "B", "A0", "B0"):
        torch.testing.assert_close(numbers_of(method)[name], before[name], atol=1e-5, rtol=1e-4)


def numbers_of(method: Method) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in method.stored().items()}


def test_lorasb_is_the_best_step_of_its_rank() -> None:
    model, batches = bert(), sentences()
    adapter = inlay.adapt(model, LoRASB(r=4, eta=1e-3))
    inlay.calibrate(model, batches)
    for level in adapter.levels[:-2]:
        method, G = level.method, gradient_of(bert(), level.site.path, batches)
        U, S, Vh = torch.linalg.svd(-1e-3 * G.sign().double())
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        assert gap(best, method.delta().dense()) < 1e-4
        for side in (method.B.T, method.A):
            torch.testing.assert_close(side @ side.T, torch.eye(4), atol=1e-5, rtol=0)
        assert [n for n, p in method.named_parameters() if p.requires_grad] == ["R"]
        assert torch.equal(method.R, method.R.diag().diag())


def test_the_gradient_of_lorasb_is_the_projected_gradient_of_w() -> None:
    """Nothing stands between: moving R by its gradient moves W by the nearest thing to W's own gradient."""
    model, batches = bert(), sentences(1)
    adapter = inlay.adapt(model, LoRASB(r=4), "block[1].mlp.up", head=None)
    inlay.calibrate(model, batches)
    method, path = adapter.levels[0].method, adapter.levels[0].site.path
    model(**batches[0]).loss.backward()
    moved = bert()
    with torch.no_grad():
        moved.get_submodule(path).weight += method.delta().dense()
    G = gradient_of(moved, path, batches)
    assert gap(method.B.T @ G @ method.A.T, method.R.grad) < 1e-4


@pytest.mark.parametrize("method", ALL[:3], ids=lambda m: m.label())
def test_the_start_is_the_base(method: Method) -> None:
    model, batches = bert(), sentences()
    with torch.no_grad():
        base = model(**batches[0]).logits
        inlay.adapt(model, method)
        inlay.calibrate(model, batches)
        assert torch.equal(base, model(**batches[0]).logits)


# ---------------------------------------------------------------------- what it sees
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
    x = torch.randn(3, 4, 7, 8)[..., : 8 if isinstance(module, nn.Conv2d) else None]
    x = x if isinstance(module, nn.Conv2d) else x[:, :, 0]
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


# ---------------------------------------------------------------------- what it leaves
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


# ---------------------------------------------------------------------- methods made of them
@pytest.mark.parametrize("outer", [DoRA, DyLoRA, DeltaLoRA])
@pytest.mark.parametrize("inner", [EVA(r=3), CorDA(r=3), LoRASB(r=3)], ids=lambda m: m.label())
def test_methods_made_of_calibrated_ones(outer: type[Method], inner: Method) -> None:
    model, batches = bert(), sentences()
    adapter = inlay.adapt(model, outer(of=inner), ("attn.q", "mlp.down"))
    with torch.no_grad():
        base = model(**batches[0]).logits
    inlay.calibrate(model, batches)
    lone = bert()
    alone = inlay.adapt(lone, inner, ("attn.q", "mlp.down"))
    inlay.calibrate(lone, batches)
    for mine, theirs in zip(adapter.levels[:-2], alone.levels[:-2], strict=True):
        for n, t in theirs.method.stored().items():
            assert torch.equal(t, mine.method.of.stored()[n])
    with torch.no_grad():
        start = model(**batches[0]).logits
    assert gap(base, start) < (1e-2 if isinstance(inner, LoRASB) else 1e-6)
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    for i in range(3):
        model(**batches[i]).loss.backward()
        optimizer.step()
        inlay.step(model, (i + 1) / 3, optimizer)
        optimizer.zero_grad()
    with torch.no_grad():
        assert model(**batches[0]).logits.isfinite().all()
    adapter.merge()


def test_relora_cannot_begin_such_a_method_anew() -> None:
    with pytest.raises(SiteError, match="without the data to start it from"):
        inlay.adapt(bert(), ReLoRA(of=EVA()))


def test_several_methods_are_served_by_one_pass() -> None:
    model, batches, calls = bert(), sentences(), 0
    adapter = inlay.adapt(model, [EVA(r=2, tau=1.0).on("attn.q"), CorDA(r=2).on("attn.v"), LoRASB(r=2).on("mlp.up")])

    def counting(batches: Batches) -> Iterator[dict[str, Tensor]]:
        nonlocal calls
        for batch in batches:
            calls += 1
            yield batch

    told: list[tuple[int, int | None]] = []
    done = inlay.calibrate(model, counting(batches), progress=lambda n, of: told.append((n, of)))
    assert (calls, done.places, done.batches, done.samples) == (3, 6, 3, 90)
    assert told == [(1, None), (2, None), (3, None)]
    assert all(m.is_calibrated for lv in adapter.levels for m in lv.method.modules() if isinstance(m, Calibrated))
    inlay.calibrate(model, batches, progress=lambda n, of: told.append((n, of)))
    assert told[3:] == [(1, 3), (2, 3), (3, 3)]
    assert "6 places on 3 batches" in str(done)


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
    assert core.starts_from_data(at(fresh, "query"))


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
