"""What is fitted to frozen features at once: nearest neighbours, and linear heads by a convex solver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_task import make_data, recipe_for
from torch import Tensor, nn

import inlay
from inlay.compare import compare
from inlay.core.errors import CheckpointError, OptionError, SiteError
from inlay.core.fitted import Features
from inlay.evaluate import evaluate
from inlay.methods import LinearProbe, NearestNeighbours
from inlay.methods.output.convex import best, logistic, objective, ridge
from inlay.recipe import CompareRecipe, Recipe, load_recipe
from inlay.train import Trained, train


def fitted(tiny: Path, folder: Path, method: Any, **fields: Any) -> Trained:
    return train(load_recipe(recipe_for(tiny, method=method, output=str(folder), **fields), Recipe))


def blobs(rows: int = 60, classes: int = 3) -> tuple[Tensor, Tensor]:
    labels = torch.arange(rows) % classes
    return torch.randn(rows, 5) * 2 + 3 * F.one_hot(labels, 5) + 10, labels


# ---------------------------------------------------------------------- the convex solver
def test_two_starts_reach_one_minimum():
    x, labels = blobs()
    x = x.double() - x.double().mean(0)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        start = 3 * torch.randn(3, 5), 3 * torch.randn(3)
        W, b = logistic(x, labels, 3, 1e-3, start)
        found.append((objective(x, labels, W, b, 1e-3), W))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-9)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4)
    assert objective(x, labels, torch.zeros(3, 5).double(), torch.zeros(3).double(), 1e-3) > found[0][0]


def test_logistic_regression_is_at_its_minimum():
    """The gradient vanishes, in closed form: (P − Y)ᵀ x / n + λ W, and the mean of P − Y."""
    x, labels = blobs()
    x, l2 = x.double(), 0.05
    W, b = logistic(x, labels, 3, l2)
    off = (x @ W.T + b).softmax(1) - F.one_hot(labels, 3)
    assert (off.T @ x / len(x) + l2 * W).abs().max() < 1e-4
    assert off.mean(0).abs().max() < 1e-5


def test_ridge_regression_is_at_its_minimum():
    x = torch.randn(40, 5).double() + 3
    y = x @ torch.arange(5.0).double() + 7 + 0.1 * torch.randn(40).double()
    w, b = ridge(x, y, 0.1)
    off = x @ w[0] + b - y
    assert (x.T @ off / 40 + 0.1 * w[0]).abs().max() < 1e-9
    assert abs(float(off.mean())) < 1e-9


def test_penalty_is_chosen_and_features_are_given_back_as_they_were():
    x, labels = blobs()
    x = torch.cat([x * 1000, torch.full((60, 1), 4.0)], 1)  # a wild unit, and a feature that never varies
    check = x[:30] + torch.randn(30, 6) * torch.tensor([1500.0] * 5 + [0])
    losses = {}

    def loss(logits: Tensor, goals: Tensor) -> Tensor:
        return F.cross_entropy(logits, goals)

    def fit(x: Tensor, l2: float, start: Any) -> Any:
        return logistic(x, labels, 3, l2, start)

    (W, b), l2 = best(x, fit, loss, (check, labels[:30]))
    assert torch.equal(W[:, 5], torch.zeros(3).double())
    for other in (1.0, 1e-2, 1e-4, 1e-6):
        (V, c), _ = best(x, fit, loss, (check, labels[:30]), (other,))
        losses[other] = float(loss(check.double() @ V.T + c, labels[:30]))
    assert float(loss(check.double() @ W.T + b, labels[:30])) <= min(losses.values()) + 1e-6
    assert l2 > 1e-6  # rows this noisy want a penalty


def test_convex_probe_is_saved_as_the_head_it_is(tiny, tmp_path):
    found = fitted(tiny, tmp_path / "a", "linearprobe(solver='convex')")
    assert (found.adapter_parameters, found.head_parameters, found.steps) == (0, 16 * 3 + 3, 0)
    assert found.saved_for_backward_bytes == 0
    assert found.peak_memory_bytes > 0
    assert evaluate(str(found.folder)) == pytest.approx(found.metrics, rel=1e-6)
    trained = fitted(tiny, tmp_path / "b", "linearprobe", base_dropout=False, epochs=20)
    assert found.validation["accuracy"] >= trained.validation["accuracy"] - 0.1
    other = fitted(tiny, tmp_path / "c", "linearprobe(solver='convex')", seed=5)
    for name, t in weights(found).items():  # a fresh head of another seed makes no difference
        assert torch.allclose(t, weights(other)[name], atol=1e-3)


def weights(found: Trained) -> dict[str, Tensor]:
    return {level.site.param: level.method.value.detach().clone() for level in found.adapter.levels}


def test_convex_probe_of_a_regression(tiny, tmp_path):
    data = make_data(tmp_path / "scores", regression=True)
    found = fitted(tiny, tmp_path / "a", "linearprobe(solver='convex')", data=data)
    scores = [float(line.rsplit(",", 1)[1]) for line in (tmp_path / "scores" / "test.csv").read_text().splitlines()[1:]]
    assert found.metrics["mse"] < float(torch.tensor(scores).var()) * 1.2
    assert found.metrics["pearson"] > 0.2


def test_what_the_convex_solver_cannot_fit(tiny, tmp_path):
    with pytest.raises(OptionError, match="l2 is the convex solver's"):
        LinearProbe(l2=0.1)
    with pytest.raises(OptionError, match="list it alone"):
        fitted(tiny, tmp_path / "a", ["linearprobe(solver='convex')", "lora"])
    rows = Features(torch.randn(4, 5), torch.arange(4) % 2)
    with pytest.raises(SiteError, match="fits one linear layer, and here the head is missing"):
        LinearProbe(solver="convex").solve(rows, rows, [])


# ---------------------------------------------------------------------- nearest neighbours
class Headed(nn.Module):
    """Features, and a head on them."""

    def __init__(self, width: int = 5, outputs: int = 3) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def bank(model: nn.Module, method: NearestNeighbours, rows: int = 20, name: str = "default") -> tuple[Any, Tensor]:
    """The method fitted to random rows, and those rows."""
    adapter = inlay.adapt(model, method, head=["head"], name=name)
    x, labels = torch.randn(rows, 4), torch.arange(rows) % 3
    with torch.no_grad():
        features = Features(torch.tanh(model.body(x)), labels)
    (level,) = adapter.levels
    level.method.solve(features, features, [])
    return adapter, x


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("temperature", [None, 0.1])
def test_votes_row_by_row(metric, temperature):
    torch.manual_seed(1)
    model = Headed()
    adapter, x = bank(model, NearestNeighbours(k=4, metric=metric, temperature=temperature))
    rows = torch.randn(6, 4)
    out, keys = model(rows), torch.tanh(model.body(x))
    for query, found in zip(torch.tanh(model.body(rows)), out, strict=True):
        d = 1 - F.cosine_similarity(keys, query[None]) if metric == "cosine" else (keys - query).norm(dim=1)
        near = sorted(range(20), key=lambda i: float(d[i]))[:4]
        w = torch.ones(4) if temperature is None else (-d[near] / temperature).exp()
        votes = torch.zeros(3)
        for i, vote in zip(near, w / w.sum(), strict=True):
            votes[i % 3] += vote
        assert torch.allclose(found.exp(), votes.clamp_min(1e-4), atol=1e-5)
    assert adapter.adapter_parameters == adapter.head_parameters == 0


def test_values_are_averaged_in_a_regression():
    model = Headed(outputs=1)
    adapter, x = bank(model, NearestNeighbours(k=3, metric="euclidean"))
    keys, rows = torch.tanh(model.body(x)), torch.randn(5, 4)
    near = torch.cdist(torch.tanh(model.body(rows)), keys).argsort(1)[:, :3]
    assert torch.allclose(model(rows)[:, 0], (near % 3).float().mean(1), atol=1e-5)
    assert adapter.levels[0].site.path == "head"


def test_one_neighbour_knows_every_training_row(tiny, tmp_path):
    found = fitted(tiny, tmp_path / "a", "nearestneighbours(k=1)")
    assert evaluate(str(found.folder), split="train")["accuracy"] == 1.0
    assert found.head_parameters == 0
    assert found.file_bytes > 48 * 16 * 4


def test_bank_is_saved_loaded_switched_and_routed(tiny, tmp_path):
    found = fitted(tiny, tmp_path / "a", "nearestneighbours(k=5)")
    assert evaluate(str(found.folder)) == pytest.approx(found.metrics)
    model = found.adapter.model
    inputs = {"input_ids": torch.randint(5, 19, (4, 6))}
    with torch.no_grad():
        ours = model(**inputs).logits
        with inlay.disabled(model):
            base = model(**inputs).logits
        second = inlay.load(model, str(found.folder), name="b")
        second.levels[0].method.labels.add_(1).remainder_(3)
        with inlay.route(model, ["default", None, "b", "default"]):
            mixed = model(**inputs).logits
        inlay.use(model, "b")
        other = model(**inputs).logits
    assert not torch.equal(ours, base)
    assert torch.equal(ours.roll(1, 1), other)
    assert torch.equal(mixed, torch.stack([ours[0], base[1], other[2], ours[3]]))
    inlay.detach(model)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.add_(0.1)
    with pytest.raises(CheckpointError, match="another base"):
        inlay.load(model, str(found.folder))


def test_before_it_is_fitted_the_head_answers():
    model = Headed()
    rows = torch.randn(3, 4)
    before = model(rows)
    inlay.adapt(model, NearestNeighbours(), head=["head"])
    assert torch.equal(before, model(rows))
    with pytest.raises(SiteError, match="trains the task head alone, but no head was found"):
        inlay.adapt(Headed(), NearestNeighbours())


# ---------------------------------------------------------------------- rows of a comparison
def test_rows_of_a_comparison(tiny, tmp_path):
    methods: list[Any] = [
        "linearprobe", {"method": "linearprobe", "solver": "convex", "label": "convex"},
        {"method": "nearestneighbours", "k": 3},
    ]  # fmt: skip
    document = recipe_for(tiny, output=str(tmp_path / "out"), epochs=1, workers=1, methods=methods)
    del document["method"]
    recipe = load_recipe(document, CompareRecipe)
    cells = {cell.method: cell for cell in compare(recipe).cells}
    assert list(cells) == ["LinearProbe", "convex", "NearestNeighbours(k=3)"]
    assert all(cell.error is None for cell in cells.values()), [cell.error for cell in cells.values()]
    for name in ("convex", "NearestNeighbours(k=3)"):
        cell = cells[name]
        assert cell.saved_for_backward_bytes == 0 < cell.peak_memory_bytes
        assert 0 < cell.metrics["accuracy"] <= 1
        assert cell.train_seconds > 0
    assert cells["convex"].head_parameters == 51
    assert "convex" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
