"""Reference values of methods that transform W: counts of the papers, PEFT's own numbers, what the maps leave alone."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from peft.tuners.oft.layer import OFTLayer
from torch import nn

import inlay
from inlay.core.method import Method
from inlay.methods import BOFT, ETHER, OFT, SSF, ETHERPlus, GLoRA, RoAd, WeightNorm
from inlay.plan import plan
from laws import nets
from laws.cases import stir
from laws.checks import close, gap, output

Q_V = ["attn.q", "attn.v"]
COUNTS = [
    # architecture, method, where, adapter parameters
    ("vit-base", "ssf", None, 205_824),
    ("roberta-base", "weightnorm", Q_V, 24 * (768 * 768 + 768)),
    ("roberta-base", "weightnorm(trained='g')", Q_V, 24 * 768),
    ("llama-7b", "oft(block_size=32)", Q_V, 64 * 63_488),  # d_in (b − 1)/2 a matrix
    ("bert-base", "boft(block_size=8)", ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"],
     12 * (5 * 768 + 3072) * 7 + 12 * (5 * 768 + 3072)),  # m d_in (b − 1)/2 rotations, d_out scales
    ("llama-7b", "oft(block_size=32, shared=true)", Q_V, 64 * 496),
    ("llama-7b", "road", ["all-linear"], 1_359_872),  # printed as 0.02 %
    ("llama-7b", "road(variant=2)", ["all-linear"], 2 * 1_359_872),
    ("llama-7b", "road(variant=4)", ["all-linear"], 4 * 1_359_872),
    ("llama-7b", "ether", Q_V, 262_144),  # 0.26M
    ("llama-7b", "etherplus(blocks=32)", Q_V, 1_048_576),  # 1.04M
    ("llama-7b", "etherplus(side='input')", Q_V, 524_288),
    ("roberta-base", "glora(r=4)", Q_V, 24 * (2 * 4 * 1536 + 4 * 769 + 2 * 768)),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "method", "where", "count"), COUNTS)
def test_adapter_parameters(arch: str, method: str, where: list[str] | None, count: int) -> None:
    assert plan(arch, method, where, memory=False).adapter_parameters == count


# ---------------------------------------------------------------------- SSF
def attached(model: nn.Module, method: Method, *where: str) -> inlay.Adapter:
    adapter = inlay.adapt(model, method, where or None)
    stir(adapter)
    return adapter


WORDS = {"input_ids": torch.randint(3, 32, (4, 6), generator=torch.Generator().manual_seed(0))}
BASES = {
    "linear": (nets.Residual, {"x": torch.randn(4, 3, 8)}, 7),  # norm, up, down and out, which has no bias
    "batchnorm": (nets.normalised, {"x": torch.randn(4, 3, 6, 5)}, 4),
    "llama": (nets.llama, WORDS, 2 * 9 + 1),  # RMSNorm and linear layers without bias
    "gemma": (nets.gemma, WORDS, None),  # RMSNorm with 1 + γ
    "gpt2": (nets.gpt2, WORDS, None),
    "bert": (nets.bert, WORDS, None),
    "vit": (nets.vit, {"pixel_values": torch.randn(4, 3, 8, 8)}, None),
    "encoder": (nets.Encoder, {"x": torch.randn(4, 5, 8)}, None),
}


@pytest.mark.parametrize("base", BASES)
def test_ssf_follows_every_operation_and_folds_into_it(base: str) -> None:
    make, inputs, tensors = BASES[base]
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    plain = output(model, inputs)
    adapter = attached(model, SSF())
    named = {level.site.path for level in adapter.levels}
    norms = {n for n, m in model.named_modules() if "norm" in type(m).__name__.lower() and not n.startswith("inlay")}
    assert norms
    assert norms <= named
    if tensors is not None:
        assert sum(1 for _ in adapter.parameters()) == tensors
    out = output(model, inputs)
    assert gap(plain, out) > 1e-2
    adapter.merge()
    close(out, output(model, inputs), 1e-5, "merged against adapted")
    adapter.unmerge()
    inlay.detach(model)
    assert torch.equal(plain, output(model.requires_grad_(False), inputs))


# ---------------------------------------------------------------------- weight normalisation
def test_weight_normalisation_folds_back_and_is_that_of_torch() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    W = model[0].weight.detach().clone()
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    adapter = inlay.adapt(model, WeightNorm(), "0")
    torch.testing.assert_close(model[0].weight, W, atol=1e-6, rtol=1e-6)
    stir(adapter)
    built = adapter.levels[0].method
    theirs.parametrizations.weight.original0.data.copy_(built.g.detach()[:, None])
    theirs.parametrizations.weight.original1.data.copy_(built.v.detach())
    theirs.bias.data.copy_(model[0]._parameters["bias"].detach())
    for y in (model(x), theirs(x)):
        y.square().sum().backward()
    close(theirs(x), model(x), 1e-6, "outputs")
    close(theirs.parametrizations.weight.original0.grad[:, 0], built.g.grad, 1e-5, "gradients of g")
    close(theirs.parametrizations.weight.original1.grad, built.v.grad, 1e-5, "gradients of V")


# ---------------------------------------------------------------------- PEFT 0.21.2
class Layers(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table, self.conv = nn.Linear(16, 12), nn.Embedding(11, 16), nn.Conv2d(4, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def pair(config: peft.PeftConfig, method: Method, layer: str) -> tuple[nn.Module, nn.Module, Method]:
    """PEFT's layer with its trained tensors moved from their start, ours on the same base, and our built method."""
    torch.manual_seed(0)
    base = Layers().eval()
    ours = Layers().eval()
    ours.load_state_dict(base.state_dict())
    config.target_modules = [layer]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p)
    built = inlay.adapt(ours, method, layer).levels[0].method
    theirs = model.base_model.model.get_submodule(layer)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not isinstance(built, BOFT):  # of which PEFT trains b² numbers for every b(b − 1)/2
        assert sum(p.numel() for p in built.parameters()) == sum(p.numel() for p in trained)
    return theirs, ours, built


def same_layer(theirs: nn.Module, ours: nn.Module, layer: str, tolerance: float = 1e-5) -> None:
    """Outputs, gradients of the input, and merged tensors."""
    torch.manual_seed(1)
    shapes = {"linear": (3, 16), "conv": (2, 4, 7, 7), "table": ()}
    x = torch.randn(shapes[layer], requires_grad=True) if layer != "table" else torch.randint(11, (2, 5))
    mine = ours.get_submodule(layer)
    if layer != "conv" or not isinstance(theirs, OFTLayer):  # which rotates patches and sums them: not its merged W
        a, b = theirs(x), mine(x)
        close(a, b, tolerance, "outputs")
        if x.requires_grad:
            found = [torch.autograd.grad(y.square().sum(), x)[0] for y in (a, b)]
            close(found[0], found[1], tolerance, "gradients")
    with torch.no_grad():
        theirs.merge()
        W = theirs.get_base_layer().weight
        close(W, mine.weight, tolerance, "W′")
        bias = getattr(theirs.get_base_layer(), "bias", None)
        if bias is not None:
            close(bias, mine.bias, tolerance, "b′")


OFTS = {
    "exact": ({"use_cayley_neumann": False}, {}, -1),  # PEFT's exact map is (I − S)(I + S)⁻¹
    "neumann": ({}, {"neumann": 5}, 1),
    "shared": ({"block_share": True, "use_cayley_neumann": False}, {"shared": True}, -1),
    "constrained": ({"coft": True, "eps": 0.3}, {"constrained": True, "epsilon": 0.3, "neumann": 5}, 1),
}


@pytest.mark.parametrize("layer", ["linear", "table", "conv"])
@pytest.mark.parametrize("case", OFTS)
def test_oft_is_that_of_peft(case: str, layer: str) -> None:
    given, options, sign = OFTS[case]
    theirs, ours, built = pair(peft.OFTConfig(oft_block_size=4, **given), OFT(block_size=4, **options), layer)
    their = theirs.oft_embedding_R if layer == "table" else theirs.oft_R
    built.S.data.copy_(sign * their["default"].weight.detach())
    same_layer(theirs, ours, layer)


class Extension:
    """What PEFT's CUDA extension computes: the block-diagonal matrices (m, d, d) of blocks (m, D, b, b), and back."""

    def forward(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    def backward(self, grad: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
        b = blocks.shape[-1]
        parts = [grad[:, i * b : (i + 1) * b, i * b : (i + 1) * b] for i in range(blocks.shape[1])]
        return [torch.stack(parts, 1)]


BOFTS = [("linear", 1, 4), ("linear", 2, 4), ("linear", 2, 2), ("linear", 3, 2), ("linear", 4, 2), ("conv", 1, 4),
         ("conv", 2, 6), ("conv", 2, 2)]  # fmt: skip


@pytest.mark.parametrize(("layer", "factors", "b"), BOFTS)
def test_boft_is_that_of_peft(layer: str, factors: int, b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if factors > 1:
        monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", Extension)
    config = peft.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=factors)
    theirs, ours, built = pair(config, BOFT(block_size=b, factors=factors), layer)
    Q = theirs.boft_R["default"].detach()
    assert Q.shape[0] == factors
    rows, cols = torch.triu_indices(b, b, 1)
    built.S.data.copy_((0.5 * (Q.mT - Q))[..., rows, cols])
    built.s.data.copy_(theirs.boft_s["default"].detach().flatten())
    same_layer(theirs, ours, layer)


def test_two_small_factors_rotate_more_than_one_block() -> None:
    for factors, reach in ((1, 2), (2, 4), (3, 8), (4, 16)):
        adapter = inlay.adapt(nn.Sequential(nn.Linear(16, 3)), BOFT(block_size=2, factors=factors), "0")
        stir(adapter)
        R = adapter.levels[0].method.rotation().of(torch.eye(16))
        assert R.ne(0).sum(0).eq(reach).all(), f"{factors} factors of 2 × 2 blocks"


@pytest.mark.parametrize("group", [4, 2, 12])
@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road_is_that_of_peft(variant: int, group: int) -> None:
    config = peft.RoadConfig(variant=f"road_{variant}", group_size=group)
    theirs, ours, built = pair(config, RoAd(variant=variant, group=group), "linear")
    for mine, their in ((built.theta, theirs.road_theta), (built.alpha, theirs.road_alpha)):
        values = their["default"].detach()
        if variant == 4:  # PEFT has the two sets of every group together
            values = values.view(-1, 2, group).transpose(0, 1).reshape(2, -1)
        mine.data.copy_(values)
    same_layer(theirs, ours, "linear")


@pytest.mark.parametrize("A_B", ["lora", "vector", "constant", "none"])
@pytest.mark.parametrize("C", ["lora", "vector", "none"])
@pytest.mark.parametrize("D_E", ["vector", "constant", "none"])
def test_glora_is_that_of_peft(A_B: str, C: str, D_E: str) -> None:
    if (A_B, C, D_E) == ("none",) * 3:
        return  # nothing to train, which PEFT allows
    config = peft.GloraConfig(r=3, config_A_B=A_B, config_C=C, config_D_E=D_E)
    theirs, ours, built = pair(config, GLoRA(r=3, A=A_B, B=A_B, C=C, D=D_E, E=D_E), "linear")
    for name in "ABCDE":
        for part, their in getattr(theirs, f"glora_{name}")["default"].named_parameters():
            mine = built.get_parameter(f"{name}_" + {"Xd": "d", "Xu": "u", "X": "x"}[part])
            mine.data.copy_(their.detach().view(mine.shape))
    same_layer(theirs, ours, "linear")


@pytest.mark.parametrize(("d", "wanted", "used"), [(18, 4, 3), (147, 32, 21), (6, 4, 3), (16, 4, 4), (20, 3, 2)])
def test_block_sizes_that_do_not_divide_are_those_of_peft(d: int, wanted: int, used: int) -> None:
    adapter = inlay.adapt(nn.Sequential(nn.Linear(d, 2)), OFT(block_size=wanted), "0")
    assert adapter.levels[0].method.b == used
    if d % wanted:
        assert OFTLayer.adjust_oft_parameters(None, d, wanted) == used


ROTATIONS = [
    OFT(block_size=4), OFT(block_size=4, shared=True), OFT(block_size=4, constrained=True, epsilon=0.5),
    BOFT(block_size=4, scale=False), BOFT(block_size=2, factors=4, scale=False), ETHER(blocks=2),
]  # fmt: skip


@pytest.mark.parametrize("method", ROTATIONS, ids=str)
def test_rotations_keep_lengths_and_angles_of_neurons(method: Method) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 6)).double()
    W = model[0].weight.detach().clone()
    adapter = inlay.adapt(model, method, "0", dtype=torch.float64)
    stir(adapter)
    turned, R = model[0].weight, adapter.levels[0].method.right().of(torch.eye(16, dtype=torch.float64)).T
    torch.testing.assert_close(R @ R.T, torch.eye(16, dtype=torch.float64))
    assert torch.linalg.det(R) > 0  # two reflections make a rotation
    assert gap(W, turned) > 1e-2
    torch.testing.assert_close(turned @ turned.T, W @ W.T)


def test_coft_stays_near_and_neumann_nearly_orthogonal() -> None:
    adapter = inlay.adapt(nn.Sequential(nn.Linear(16, 6)), OFT(block_size=4, constrained=True, epsilon=0.02), "0")
    stir(adapter)
    R = adapter.levels[0].method.rotation().of(torch.eye(16))
    assert 0.01 < (R - torch.eye(16)).norm() < 2 * 0.02 * 1.01  # 4 blocks of radius ε/2 in S, twice that in R
    near = inlay.adapt(nn.Sequential(nn.Linear(16, 6)), OFT(block_size=4, neumann=5), "0")
    stir(near, by=0.05)
    R = near.levels[0].method.rotation().of(torch.eye(16))
    assert 1e-8 < gap(torch.eye(16), R @ R.T) < 1e-3


# ---------------------------------------------------------------------- ETHER
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_reflections_undo_themselves_at_a_constant_distance_from_the_identity(blocks: int) -> None:
    one = torch.eye(16)
    for seed in range(3):
        adapter = inlay.adapt(nn.Sequential(nn.Linear(16, 6)), ETHER(blocks=blocks), "0", seed=seed)
        stir(adapter)
        H = adapter.levels[0].method.right().of(one)
        torch.testing.assert_close(H @ H, one)
        torch.testing.assert_close((H - one).norm(), torch.tensor(2 * blocks**0.5))


def test_etherplus_starts_at_the_identity_and_stays_within_twice_root_n() -> None:
    adapter = inlay.adapt(nn.Sequential(nn.Linear(16, 6)), ETHERPlus(blocks=2), "0")
    built, one = adapter.levels[0].method, torch.eye(16)
    torch.testing.assert_close(built.right().of(one), one)
    with torch.no_grad():
        built.v_in.copy_(torch.randn_like(built.v_in))
    H = built.right().of(one)
    assert 0.1 < (H - one).norm() <= 2 * 2**0.5
    torch.testing.assert_close(H, H.T)


# ---------------------------------------------------------------------- RoAd
def test_road_pairs_neighbours_by_default() -> None:
    adapter = inlay.adapt(nn.Sequential(nn.Linear(3, 4)), RoAd(), "0")
    built = adapter.levels[0].method
    with torch.no_grad():
        built.theta.copy_(torch.tensor([torch.pi / 2, 0.0]))
        built.alpha.copy_(torch.tensor([2.0, 3.0]))
    turned = built.left().of(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    torch.testing.assert_close(turned, torch.tensor([-20.0, 2.0, 300.0, 3000.0]))
