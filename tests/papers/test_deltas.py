"""Reference values of the methods that add a structured ΔW: counts, PEFT 0.21.2's matrices, what their papers claim."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import peft
import peft.optimizers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay.core.method import Method, method_from
from inlay.methods import NOLA, SVFT, DiaBlo, KRAdapter, KronA, KronAB, LoHa, LoKr, LoRA, LoRAFA, LoRAXS, PiSSA, VBLoRA
from inlay.plan import plan

Q_V = ["attn.q", "attn.v"]
SIX = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"]


# ---------------------------------------------------------------------- counts
@pytest.mark.parametrize(
    ("arch", "method", "where", "count"),
    [
        ("roberta-large", "lorafa(r=8)", Q_V, 393_216),
        ("roberta-large", "lorafa(r=75)", Q_V, 3_686_400),
        ("roberta-large", "lorafa(r=16)", SIX, 3_538_944),
        ("llama-7b", "pissa(r=128)", ["all-linear"], 319_815_680),
        ("llama-7b", "loraxs(r=64)", ["all-linear"], 917_504),
        ("roberta-large", "vblora(vectors=90, length=256, r=4)", Q_V, 161_280),
        ("gpt2-medium", "nola(r=8, bases=512)", Q_V, 2 * 512 * 48),
    ],
)
def test_counts_on_architectures(arch: str, method: str, where: list[str], count: int) -> None:
    assert plan(arch, method, where, memory=False).adapter_parameters == count


STARTED = ["svft(structure='top')", "vblora", "loraxs", "nola", "pissa", "lorafa(corrected=true)", "eva", "corda",
           "corda(mode='knowledge')", "lorasb"]  # fmt: skip


@pytest.mark.parametrize("text", STARTED)
def test_planning_without_storage(text: str) -> None:
    """Nothing that reads numbers stands in the way of a model on the meta device, large or small."""
    for width in (48, 600):
        model = nn.Sequential(nn.Linear(width, 720, device="meta"))
        adapter = inlay.adapt(model, method_from(text), "0")
        assert all(p.is_meta for p in adapter.parameters())
        assert model(torch.empty(2, width, device="meta")).shape == (2, 720)


@pytest.mark.parametrize(
    ("method", "d_in", "d_out", "count"),
    [
        (LoHa(r=8), 4096, 4096, 2 * 8 * 8192),
        (LoKr(r=8), 4096, 4096, 5120),
        (LoKr(r=8, factor=8), 4096, 4096, 8256),
        (LoKr(r=4), 4096, 11008, 64 * 86 + 4 * (64 + 128)),
        (KronA(rows=32, columns=24), 768, 768, 1536),
        (KronA(), 768, 768, 1536),
        (SVFT(), 4096, 4096, 4096),
        (SVFT(structure="banded", band=2), 4096, 4096, 20_474),
        (SVFT(structure="random", band=16), 4096, 4096, 134_896),
        (DiaBlo(blocks=64), 4096, 4096, 262_144),
        (KRAdapter(), 1024, 768, 49_920),
        (KRAdapter(), 768, 1024, 49_920),
    ],
)
def test_counts_of_one_matrix(method: Method, d_in: int, d_out: int, count: int) -> None:
    with torch.device("meta"):
        adapter = inlay.adapt(nn.Sequential(nn.Linear(d_in, d_out)), method, "0")
    assert adapter.adapter_parameters == adapter.levels[0].method.count(adapter.levels[0].site) == count


def test_counts_of_convolutions() -> None:
    conv = nn.Sequential(nn.Conv2d(320, 320, 3))
    for method, count in ((LoHa(r=4, tucker=True), 2 * 4 * (640 + 4 * 9)), (LoHa(r=4), 2 * 4 * (320 + 320 * 9)),
                          (LoKr(r=2, tucker=True), 16 * 16 + 2 * 40 + 2 * 2 * 9)):  # fmt: skip
        adapter = inlay.adapt(conv, method, "0")
        assert adapter.adapter_parameters == count
        inlay.detach(conv)


# ---------------------------------------------------------------------- PEFT's matrices
def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 36), nn.Tanh(), nn.Linear(36, 12))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1, 2), nn.Tanh(), nn.Conv2d(12, 6, 1))


def loha(p: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for k in "12":
        core = p.get(f"hada_t{k}")
        B = p[f"hada_w{k}_a"]
        found |= {f"B{k}": B if core is None else B.T, f"A{k}": p[f"hada_w{k}_b"]}
        found |= {} if core is None else {f"T{k}": core.flatten(2)}
    return found


def lokr(p: dict[str, Tensor]) -> dict[str, Tensor]:
    core = p.get("lokr_t2")
    names = {"lokr_w1": "C", "lokr_w1_a": "C1", "lokr_w1_b": "C2", "lokr_w2": "D", "lokr_w2_a": "B", "lokr_w2_b": "A"}
    found = {names[k]: t.flatten(1) for k, t in p.items() if k in names}
    return found if core is None else found | {"B": found["B"].T, "T": core.flatten(2)}


def vblora(p: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"vblora_logits_A": "logits_A", "vblora_logits_B": "logits_B", "vblora_vector_bank": "own_bank"}
    return {names[k]: t for k, t in p.items()}


def low_rank(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"A": p["lora_A"], "B": p["lora_B"]}


Read = Callable[[dict[str, Tensor]], dict[str, Tensor]]
AT = {"target_modules": ["0", "2"]}
PARITY: list[tuple[str, Callable[[], nn.Module], Method, peft.PeftConfig, Read]] = [
    ("loha", linear, LoHa(r=3, alpha=5), peft.LoHaConfig(r=3, alpha=5, **AT), loha),
    ("loha-conv", conv, LoHa(r=3, alpha=5), peft.LoHaConfig(r=3, alpha=5, **AT), loha),
    ("loha-tucker", conv, LoHa(r=2, tucker=True, alpha=5),
     peft.LoHaConfig(r=2, alpha=5, use_effective_conv2d=True, **AT), loha),
    ("lokr", linear, LoKr(r=2, alpha=5), peft.LoKrConfig(r=2, alpha=5, **AT), lokr),
    ("lokr-full", linear, LoKr(r=8, alpha=5), peft.LoKrConfig(r=8, alpha=5, **AT), lokr),
    ("lokr-both", linear, LoKr(r=1, alpha=5, factor=3, decompose_both=True),
     peft.LoKrConfig(r=1, alpha=5, decompose_factor=3, decompose_both=True, **AT), lokr),
    ("lokr-conv", conv, LoKr(r=1, alpha=5), peft.LoKrConfig(r=1, alpha=5, **AT), lokr),
    ("lokr-tucker", conv, LoKr(r=1, tucker=True), peft.LoKrConfig(r=1, alpha=8, use_effective_conv2d=True, **AT), lokr),
    ("vblora", linear, VBLoRA(r=2, vectors=7, length=6, top=3),
     peft.VBLoRAConfig(r=2, num_vectors=7, vector_length=6, topk=3, **AT), vblora),
    ("pissa", linear, PiSSA(r=3, alpha=5), peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights="pissa", **AT),
     low_rank),
    ("lorafa", linear, LoRAFA(r=3, alpha=5), peft.LoraConfig(r=3, lora_alpha=5, **AT), low_rank),
]  # fmt: skip


@pytest.mark.parametrize("case", PARITY, ids=lambda case: case[0])
def test_peft_merges_to_the_same_weights(case: tuple) -> None:
    """The same numbers in both give the same W′, and the same output before merging."""
    _, base, method, config, read = case
    torch.manual_seed(3)
    plain = base()
    x = torch.randn(4, 24) if base is linear else torch.randn(2, 8, 9, 9)
    ours = base()
    ours.load_state_dict(plain.state_dict())
    adapter = inlay.adapt(ours, method, ("0", "2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(plain, config).eval()
    give(adapter, theirs, read)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=2e-5, rtol=1e-4)
        merged = theirs.merge_and_unload()
        adapter.merge()
        for k in (0, 2):
            torch.testing.assert_close(ours[k].weight, merged[k].weight, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def give(adapter: inlay.Adapter, theirs: nn.Module, read: Read) -> None:
    """Move PEFT's numbers away from their start, and let the adapter have the same."""
    for n, p in theirs.named_parameters():
        if any(mark in n for mark in ("hada_", "lokr_", "vblora_", "lora_")):
            p.add_(0.2 * torch.randn_like(p))
    for level in adapter.levels:
        layer = theirs.base_model.model[int(level.site.path)]
        held = {n.partition(".")[0]: p for n, p in layer.named_parameters() if not n.startswith("base_layer")}
        own = level.method.stored()
        for name, t in read(held).items():
            if name in own:
                own[name].data.copy_(t)


ROWS: list[tuple[Method, peft.PeftConfig, Read]] = [
    (LoHa(r=3, row_dropout=0.5), peft.LoHaConfig(r=3, rank_dropout=0.5, **AT), loha),
    (LoKr(r=2, row_dropout=0.5), peft.LoKrConfig(r=2, rank_dropout=0.5, rank_dropout_scale=True, **AT), lokr),
    (LoKr(r=2, row_dropout=0.5, rescale=False), peft.LoKrConfig(r=2, rank_dropout=0.5, **AT), lokr),
]


@pytest.mark.parametrize("case", ROWS, ids=["loha", "lokr", "lokr-unscaled"])
def test_rows_rest_as_in_peft(case: tuple) -> None:
    """The same draws leave the same rows out, at the same scale."""
    method, config, read = case
    torch.manual_seed(3)
    ours = linear()
    theirs = peft.get_peft_model(copy.deepcopy(ours), config).train()
    give(inlay.adapt(ours, method, ("0", "2")), theirs, read)
    layers = [theirs.base_model.model[k] for k in (0, 2)]
    for mine, their in zip((ours.train()[0], ours[2]), layers, strict=True):
        x = torch.randn(4, their.base_layer.in_features)
        torch.manual_seed(7)
        wanted = their(x)
        torch.manual_seed(7)
        torch.rand(1)  # by which peft finds that no module rests
        torch.testing.assert_close(mine(x), wanted, atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------------- what the papers say
def one(method: Method, d_in: int = 36, d_out: int = 36) -> tuple[nn.Module, inlay.Adapter, Method]:
    """A linear layer with that method, its tensors moved."""
    model = nn.Sequential(nn.Linear(d_in, d_out))
    adapter = inlay.adapt(model, method, "0")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, adapter, adapter.levels[0].method


def rank_of(method: Method) -> int:
    return int(torch.linalg.matrix_rank(one(method)[2].delta().dense().detach()))


def test_ranks() -> None:
    """LoHa's rank is r², KronA's rank(A)·rank(B), KRAdapter's and DiaBlo's full, with fewer numbers than a LoRA."""
    assert rank_of(LoRA(r=3)) == 3
    assert rank_of(LoHa(r=3)) == 9
    assert rank_of(KronA(rows=4, columns=6)) == 4 * 6
    assert rank_of(KRAdapter()) == 36
    assert rank_of(DiaBlo(blocks=4)) == 36
    assert rank_of(PiSSA(r=3)) == 6  # a LoRA of rank 2r


# ---------------------------------------------------------------------- what rests in training
def moved(method: Method) -> tuple[nn.Module, Tensor]:
    """A linear layer with that method, and its ΔW."""
    model, _, built = one(method)
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, built.delta().dense().detach()


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("cls", [LoHa, LoKr])
def test_rows_rest_in_training(cls: type[LoHa | LoKr], rescale: bool) -> None:
    """A row of ΔW is gone or whole; scaled up, so that the rows' mean weight is 1, unless that is switched off."""
    model, D = moved(cls(r=2, row_dropout=0.4, rescale=rescale))
    x, share = torch.eye(36), []
    bias = model.eval()(torch.zeros(1, 36))
    base = model(x) - bias - D.T
    for seed in range(30):
        torch.manual_seed(seed)
        found = (model.train()(x) - bias - base).T.detach()
        weight = (found / D).mean(1)
        torch.testing.assert_close(found, weight[:, None] * D, atol=1e-4, rtol=1e-3)
        rests = weight.abs() < 1e-3
        share.append(rests.float().mean().item())
        up = 1 / (1 - share[-1]) if rescale else 1.0
        torch.testing.assert_close(weight[~rests], torch.full_like(weight[~rests], up), atol=1e-3, rtol=1e-3)
    assert 0.3 < sum(share) / 30 < 0.5
    assert torch.equal(model.eval()(x), model.eval()(x))


@pytest.mark.parametrize("cls", [LoHa, LoKr])
def test_a_whole_update_rests_in_training(cls: type[LoHa | LoKr]) -> None:
    model, D = moved(cls(r=2, module_dropout=0.3))
    x = torch.randn(5, 36)
    whole = model.eval()(x)
    base, rests = whole - x @ D.T, 0
    for seed in range(200):
        torch.manual_seed(seed)
        y = model.train()(x)
        off = torch.allclose(y, base, atol=1e-5)
        assert off or torch.allclose(y, whole, atol=1e-5)
        rests += off
    assert 40 < rests < 80


def test_lorafa_keeps_a_and_projects_the_gradient() -> None:
    """A never moves. Corrected, a step along B's gradient moves W along G's projection on the rows of A."""
    model, _, method = one(LoRAFA(r=4, alpha=6, corrected=True))
    A = method.A.clone()
    x, target = torch.randn(50, 36), torch.randn(50, 36)
    (model(x) - target).square().sum().backward()
    G = 2 * (model(x) - target).T @ x
    moved = method.scale * method.B.grad @ A
    torch.testing.assert_close(moved, G @ torch.linalg.pinv(A) @ A, atol=1e-2, rtol=1e-3)
    torch.optim.SGD(model.inlay.parameters(), lr=0.1).step()
    assert torch.equal(method.A, A)
    assert [n for n, _ in method.named_parameters()] == ["B"]


def test_lorafa_takes_the_steps_of_pefts_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft corrects gradients in its own optimizer (in bfloat16 where it can); here any optimizer's are."""
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    torch.manual_seed(3)
    ours = linear()
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(r=3, lora_alpha=5, **AT))
    adapter = inlay.adapt(ours, LoRAFA(r=3, alpha=5, corrected=True), ("0", "2"))
    give(adapter, theirs, low_rank)
    x, y = torch.randn(64, 24), torch.randn(64, 12)
    optimizers = (
        (ours, inlay.optimizer(adapter, 0.02)),
        (theirs, peft.optimizers.create_lorafa_optimizer(theirs, r=3, lora_alpha=5, lr=0.02)),
    )
    for _ in range(20):
        for model, optimizer in optimizers:
            (model(x) - y).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-3, rtol=1e-3)
    for level in adapter.levels:
        layer = theirs.base_model.model[int(level.site.path)]
        torch.testing.assert_close(level.method.B, layer.lora_B["default"].weight, atol=1e-4, rtol=1e-3)


def test_frozen_factors_keep_no_input_for_the_backward_pass() -> None:
    """LoRA keeps x (tokens, d_in); LoRA-FA and LoRA-XS keep A x (tokens, r)."""
    for method, keeps in ((LoRA(r=2), True), (LoRAFA(r=2), False), (LoRAXS(r=2), False)):
        model, _, _ = one(method)
        x, kept = torch.randn(7, 36, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.shape) or t, lambda t: t):
            model(x)
        assert (x.shape in kept) is keeps, (method, kept)
        assert (7, 2) in kept


def test_pissa_is_the_base_at_the_start_and_the_principal_part() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = nn.Sequential(nn.Linear(36, 24)).to(dtype)
        x = torch.randn(5, 36, dtype=dtype)
        before = model(x)
        method = inlay.adapt(model, PiSSA(r=4, alpha=2), "0").levels[0].method
        assert torch.equal(model(x), before)
    W = model[0].weight.detach().double()
    residual = W - (method.scale * method.B0 @ method.A0).double()
    singular = torch.linalg.svdvals(W)
    torch.testing.assert_close(torch.linalg.svdvals(residual)[:4], singular[4:8], atol=1e-4, rtol=1e-4)


def test_loraxs_factors() -> None:
    """B has orthonormal columns, A Aᵀ = Σ_r², and R = 0 is the base."""
    model, _, _ = one(LoRAXS(r=5, alpha=5, deviation=0.0))
    shared = dict(model.inlay.tensors.named_buffers())
    A, B = (next(t for n, t in shared.items() if n.endswith(end)) for end in ("-A", "-B"))
    sigma = torch.linalg.svdvals(model[0]._parameters["weight"])[:5]
    torch.testing.assert_close(B.T @ B, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(A @ A.T, sigma.square().diag(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [LoRAXS(r=5), SVFT(), SVFT(structure="top")])
def test_derived_factors_of_another_base_are_refused(method: Method, tmp_path) -> None:
    """Files hold the trained numbers and a print of the singular vectors; `shared` keeps those as well."""
    from inlay.core.checkpoint import save
    from inlay.core.errors import CheckpointError

    model, adapter, _ = one(method)
    base = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("inlay.")}
    x = torch.randn(5, 36)
    out = model(x)
    adapter.save(str(tmp_path / "small"))
    save(adapter, tmp_path / "full", shared=True)
    assert all("shared" not in k for k in load_file(tmp_path / "small" / "adapter.safetensors"))

    def opened(change: float, folder: str) -> Tensor:
        fresh = nn.Sequential(nn.Linear(36, 36))
        fresh.load_state_dict(base)
        fresh[0].weight.data += change * torch.randn(36, 36)
        inlay.load(fresh, tmp_path / folder, any_base=True)
        return fresh(x)

    assert torch.equal(opened(0.0, "small"), out)
    torch.testing.assert_close(opened(1e-6, "small"), out, atol=1e-3, rtol=1e-3)  # rounding
    with pytest.raises(CheckpointError, match="computed from the base differs"):
        opened(0.1, "small")
    opened(0.1, "full")


def test_svft_patterns() -> None:
    """Top takes the entries of |UᵀV| that are largest, random as many without repetition, banded those of the band."""
    for structure in ("banded", "random", "top"):
        model, adapter, method = one(SVFT(structure=structure, band=2))
        at = method.entries.long()
        assert len(at.unique()) == len(at) == method.count(adapter.levels[0].site) == 36 * 5 - 6
        if structure == "banded":
            assert int((at // 36 - at % 36).abs().max()) == 2
        if structure == "top":
            U, _, Vh = torch.linalg.svd(model[0]._parameters["weight"].detach().double())
            aligned = (U.T @ Vh.T).abs().flatten()
            assert float(aligned[at].min()) >= float(aligned.sort(descending=True).values[len(at)]) - 1e-6


def test_nola_file_holds_coefficients_alone(tmp_path) -> None:
    _, adapter, _ = one(NOLA(r=4, bases=10))
    adapter.save(str(tmp_path))
    stored = load_file(tmp_path / "adapter.safetensors")
    assert sorted(n.rpartition(".")[2] for n in stored) == ["a", "b"]
    assert all(t.numel() == 10 for t in stored.values())


def test_vblora_compact_files(tmp_path) -> None:
    """h·b numbers of the bank, and of each piece K − 1 numbers and K indices; the same bits out of a fresh model."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(36, 24), nn.Linear(24, 36))
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    adapter = inlay.adapt(plain, VBLoRA(r=2, vectors=50, top=3, compact=True), ("0", "1"))
    x = torch.randn(5, 36)
    adapter.save(str(tmp_path))
    stored = load_file(tmp_path / "adapter.safetensors")
    pieces = 2 * 2 * (36 + 24) // 12
    numbers = sum(t.numel() for t in stored.values() if t.is_floating_point())
    assert numbers == 50 * 12 + pieces * 2
    assert sum(t.numel() for t in stored.values() if t.dtype == torch.uint8) == pieces * 3
    fresh = nn.Sequential(nn.Linear(36, 24), nn.Linear(24, 36))
    fresh.load_state_dict(state)
    inlay.load(fresh, tmp_path)
    assert torch.equal(fresh(x), plain(x))


def test_diablo_leaves_what_is_off_the_diagonal() -> None:
    model, adapter, _ = one(DiaBlo(blocks=4), 24, 36)
    before = model[0]._parameters["weight"].clone()
    adapter.merge()
    block = torch.block_diag(*torch.ones(4, 9, 6)).bool()
    assert torch.equal(model[0].weight[~block], before[~block])
    assert bool((model[0].weight != before)[block].all())


def test_krona_branch_with_a_scaled_residual() -> None:
    """y + s (A ⊗ B) x + s_res x; at the start not the base, unless s_res starts at zero."""
    x = torch.randn(5, 12)
    for start in (0.0, 1.0):
        model = nn.Sequential(nn.Linear(12, 12))
        y = model(x)
        method = inlay.adapt(model, KronAB(residual=True, residual_start=start, scale=0.5), "0").levels[0].method
        torch.testing.assert_close(model(x), y + start * x)
        with torch.no_grad():
            method.B.normal_()
        torch.testing.assert_close(model(x), y + start * x + 0.5 * x @ torch.kron(method.A, method.B).T)
    with pytest.raises(inlay.core.errors.SiteError, match="12 wide, to its output of 18"):
        inlay.adapt(nn.Sequential(nn.Linear(12, 18)), KronAB(residual=True), "0")


def test_widths_that_do_not_fit_are_refused() -> None:
    for method, reason in ((KronA(rows=5), "rows=5 does not divide the width 36"),
                           (VBLoRA(length=7), "greatest common divisor is 12")):  # fmt: skip
        with pytest.raises(inlay.core.errors.SiteError, match=reason):
            inlay.adapt(nn.Sequential(nn.Linear(24, 36)), method, "0")
