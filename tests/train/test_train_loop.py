"""What the loop computes: accumulation, groups, schedules, order, early stopping, costs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inlay import adapt
from inlay.core import active as core
from inlay.core.checkpoint import read
from inlay.core.errors import OptionError
from inlay.core.head import Head
from inlay.evaluate import evaluate
from inlay.methods import DoRA, VeRA
from inlay.optim import AdamW
from inlay.recipe import Recipe
from inlay.train import TrainError, train
from inlay.train.groups import factor, optimiser
from inlay.train.measure import Watch, saved_for_backward, step_memory, storages
from inlay.train.order import Order
from inlay.train.progress import Bar, Silent
from inlay.train.targets import start_at_labels

Make = Callable[..., Recipe]


class Notes(Silent):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.values: list[dict[str, float]] = []
        self.said: list[str] = []

    def step(self, step: int, loss: float, rate: float) -> None:
        self.losses.append(loss)
        self.rates.append(rate)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.values.append(metrics)

    def say(self, text: str) -> None:
        self.said.append(text)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read(folder)[1]


# ---------------------------------------------------------------------- learning
def test_it_learns_and_the_folder_is_enough(recipe: Make) -> None:
    trained = train(recipe(method="full", epochs=15, base_dropout=False))
    assert trained.metrics["accuracy"] > 0.9
    assert trained.curve[-1]["loss"] < 0.5 * trained.curve[0]["loss"]
    assert evaluate(str(trained.folder)) == trained.metrics
    about = read(trained.folder)[0]["about"]
    assert about["labels"] == ["avian", "canine", "feline"]
    assert about["task"] == "text-classification"
    assert about["metrics"]["test"] == trained.metrics
    assert trained.file_bytes == (trained.folder / "adapter.safetensors").stat().st_size


def test_regression(recipe: Make, tmp_path: Path) -> None:
    from tiny_task import make_data

    data = make_data(tmp_path / "scores", regression=True)
    trained = train(recipe(data=data, method="full", epochs=15, base_dropout=False))
    assert trained.metrics["pearson"] > 0.7
    assert evaluate(str(trained.folder)) == trained.metrics


@pytest.mark.parametrize(("scale", "shift"), [(0.01, 0.0), (40.0, 1000.0)])
def test_a_regression_learns_whatever_the_scale_of_its_labels(
    recipe: Make, tmp_path: Path, scale: float, shift: float
) -> None:
    """Labels a·y + b lead to predictions a·ŷ + b: every step is the same step in the unit of the labels."""
    from tiny_task import make_data

    plain = make_data(tmp_path / "plain", regression=True)
    scaled = make_data(tmp_path / "scaled", regression=True)
    for file in Path(scaled).glob("*.csv"):
        head, *rows = file.read_text().splitlines()
        pairs = [row.rpartition(",") for row in rows]
        file.write_text("\n".join([head, *(f"{t},{scale * float(y) + shift!r}" for t, _, y in pairs)]) + "\n")
    fields = {"method": "lora", "epochs": 6, "base_dropout": False, "task": "regression"}
    a = train(recipe(data=plain, output=str(tmp_path / "a"), **fields))
    b = train(recipe(data=scaled, output=str(tmp_path / "b"), **fields))
    assert b.metrics["pearson"] == pytest.approx(a.metrics["pearson"], abs=0.02)
    assert b.metrics["mse"] == pytest.approx(scale**2 * a.metrics["mse"], rel=0.05)
    assert b.curve[0]["loss"] == pytest.approx(scale**2 * a.curve[0]["loss"], rel=1e-2)
    assert [p["rate"] for p in b.curve] == [p["rate"] for p in a.curve]
    assert evaluate(str(b.folder)) == b.metrics


def test_a_fresh_regression_head_starts_at_the_mean_of_the_labels(recipe: Make, tmp_path: Path) -> None:
    from tiny_task import make_data

    from inlay.work import open_work

    made = recipe(data=make_data(tmp_path / "scores", regression=True))
    work = open_work(made)
    labels = torch.tensor(work.data.splits["train"].column("label"))
    before = work.model.classifier.weight.clone()
    adapter = work.attach(made)
    assert start_at_labels(adapter, ["classifier"], labels.tolist()) == pytest.approx(float(labels.std(correction=0)))
    head = {level.site.param: level.method for level in adapter.levels if isinstance(level.method, Head)}
    assert head["bias"].value.item() == pytest.approx(float(labels.mean()))
    torch.testing.assert_close(head["weight"].value, before * labels.std(correction=0))
    assert head["weight"].unit == pytest.approx(float(labels.std(correction=0)))


def test_a_trained_regression_head_is_left_as_it_is(recipe: Make, tmp_path: Path) -> None:
    from tiny_task import make_data

    from inlay.work import open_work

    made = recipe(data=make_data(tmp_path / "scores", regression=True))
    adapter = open_work(made).attach(made)
    before = [p.clone() for p in adapter.parameters()]
    assert start_at_labels(adapter, [], [1.0, 5.0]) == 1.0
    assert all(torch.equal(p, t) for p, t in zip(adapter.parameters(), before, strict=True))


def test_same_seed_same_adapter_other_seed_other_adapter(recipe: Make, tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in "abc"}
    for (name, folder), seed in zip(runs.items(), (3, 3, 4), strict=True):
        torch.manual_seed(hash(name) % 1000)  # the global state must not matter
        train(recipe(seed=seed, output=str(folder), steps=4))
    a, b, c = (weights(folder) for folder in runs.values())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a if a[k].std() > 0)


def test_the_global_random_state_is_left_alone(recipe: Make) -> None:
    before = torch.get_rng_state()
    train(recipe(steps=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluating_more_often_changes_nothing(recipe: Make, tmp_path: Path) -> None:
    train(recipe(output=str(tmp_path / "a")))
    train(recipe(output=str(tmp_path / "b"), evaluate_every=1))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_accumulation_equals_a_larger_batch(recipe: Make, tmp_path: Path) -> None:
    """8 × 2 rows = 16 rows, also where the last step of the epoch is smaller (44 rows)."""
    fields: dict[str, Any] = {"base_dropout": False, "method": "lora(r=2)", "limit": {"train": 44}, "clip": None}
    train(recipe(**fields, batch=16, output=str(tmp_path / "a")))
    train(recipe(**fields, batch=8, accumulate=2, output=str(tmp_path / "b")))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
    train(recipe(**fields, batch=8, output=str(tmp_path / "c")))
    c = weights(tmp_path / "c")
    assert any(not torch.allclose(a[k], c[k], rtol=1e-2, atol=1e-3) for k in a), "the check can fail"


def test_early_stopping_keeps_the_best(recipe: Make) -> None:
    notes = Notes()
    trained = train(
        recipe(patience=2, evaluate_every=1, epochs=30, metric="macro_f1", learning_rate=0.3, method="full"), notes
    )
    values = [v["macro_f1"] for v in notes.values]
    best = values.index(max(values))
    assert trained.best_step == best + 1
    assert trained.steps == best + 3 < 180, "two evaluations without a better one, then the end"
    assert trained.validation == notes.values[best]
    assert "stopped" in notes.said[-1]
    assert evaluate(str(trained.folder), split="validation") == trained.validation


def test_a_loss_that_is_not_finite_ends_the_run(recipe: Make) -> None:
    with pytest.raises(TrainError, match="lower the learning rate"):
        train(recipe(method="full", learning_rate=1e30, clip=None))


def test_unknown_metric_and_split(recipe: Make) -> None:
    with pytest.raises(OptionError, match=r"unknown metric 'acuracy'; did you mean 'accuracy'"):
        train(recipe(metric="acuracy"))


# ---------------------------------------------------------------------- precision, checkpointing, logs
@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_low_precision(recipe: Make, precision: str) -> None:
    trained = train(recipe(precision=precision, steps=4))
    assert all(t.dtype == torch.float32 for t in weights(trained.folder).values())
    base = next(p for n, p in trained.adapter.model.named_parameters() if not n.startswith("inlay."))
    assert base.dtype == (torch.bfloat16 if precision == "bfloat16" else torch.float32)
    assert evaluate(str(trained.folder)) == trained.metrics


def test_gradient_checkpointing_gives_the_same_adapter_for_less_memory(recipe: Make, tmp_path: Path) -> None:
    plain = train(recipe(output=str(tmp_path / "a"), steps=4))
    spared = train(recipe(output=str(tmp_path / "b"), steps=4, gradient_checkpointing=True))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
    assert spared.saved_for_backward_bytes < 0.6 * plain.saved_for_backward_bytes


def test_tensorboard(recipe: Make) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained = train(recipe(tensorboard=True))
    events = EventAccumulator(str(trained.folder / "logs"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [p["step"] for p in trained.curve]
    assert [round(e.value, 5) for e in events.Scalars("accuracy")] == [
        round(p["accuracy"], 5) for p in trained.curve if "accuracy" in p
    ]


def test_the_bar_shows_what_it_is_told(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe(steps=3), Bar("accuracy"))
    shown = capsys.readouterr().err
    assert "LoRA" in shown
    assert "3/3" in shown
    assert "loss" in shown


# ---------------------------------------------------------------------- groups and schedules
class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def rates(model: nn.Module, adapter: Any, **fields: Any) -> dict[str, tuple[float, float]]:
    recipe = Recipe(**{"model": "m", "data": "d", "method": "lora", **fields})
    own = core.attached(model).adapters["default"]
    names = {id(p): n for n, p in own.named_parameters()}
    groups = optimiser(adapter, recipe).param_groups
    return {names[id(p)]: (g["peak"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_every_tensor_has_the_rate_of_its_method() -> None:
    model = Two()
    adapter = adapt(model, [{"dora": {"of": "vera(r=2)"}}], ["first"], head=["second"])
    found = rates(model, adapter)
    assert found["first.m"] == (DoRA.learning_rate, 0.0)
    assert found["first.of.d"] == found["first.of.b"] == (VeRA.learning_rate, 0.0)
    assert DoRA.learning_rate != VeRA.learning_rate
    heads = {k: v for k, v in found.items() if not k.startswith("first")}
    assert {rate for rate, _ in heads.values()} == {Head.learning_rate}
    given = rates(model, adapter, learning_rate=0.5, weight_decay=0.1)
    assert given["first.of.d"] == (0.5, 0.0)
    assert sorted({given[k] for k in heads}) == [(0.5, 0.0), (0.5, 0.1)], "vectors do not decay"
    assert {rates(model, adapter, learning_rate=0.5, head_learning_rate=0.2)[k][0] for k in heads} == {0.2}


def test_lora_plus_raises_the_rate_of_b() -> None:
    model = Two()
    adapter = adapt(model, "lora(r=2, bias=true)", ["first"], head=["second"])
    found = rates(model, adapter, lora_plus=16.0, learning_rate=1e-3)
    assert found["first.A"][0] == pytest.approx(1e-3)
    assert found["first.B"][0] == pytest.approx(16e-3)
    assert found["first.b"][0] == pytest.approx(16e-3), "vectors are in the fast group too"
    assert {v[0] for k, v in found.items() if not k.startswith("first")} == {1e-3}
    other = Two()
    with pytest.raises(OptionError, match="lora_plus"):
        rates(other, adapt(other, "bitfit", ["first"], head=["second"]), lora_plus=16.0)


def test_steps_within_the_backward_pass_need_whole_gradients_nowhere(recipe: Make) -> None:
    with pytest.raises(OptionError, match="clip: null"):
        train(recipe(method="galore(per_layer=true)", clip=1.0))
    with pytest.raises(OptionError, match="accumulate: 1"):
        train(recipe(method="galore(per_layer=true)", clip=None, accumulate=2))


def test_the_measured_peak_counts_what_the_optimizer_keeps(recipe: Make, tmp_path: Path) -> None:
    """GaLore's state is smaller than AdamW's by the closed form."""
    peaks = {}
    for i, method in enumerate(("galore(r=16)", "galore(r=1)")):
        done = train(recipe(method=method, steps=1, output=str(tmp_path / str(i))))
        peaks[method] = done.peak_memory_bytes
    whole, low = 2 * (4 * 16 * 16 + 2 * 16 * 32), 4 * (2 * 16 + 16) + 2 * (2 * 32 + 16)
    assert peaks["galore(r=16)"] - peaks["galore(r=1)"] == 4 * 2 * (whole - low)


def test_schedules() -> None:
    linear = [factor("linear", 0.2, s, 10) for s in range(10)]
    assert linear[:3] == [0.5, 1.0, 1.0]
    assert linear[-1] == pytest.approx(1 / 8)
    cosine = [factor("cosine", 0.0, s, 10) for s in range(10)]
    assert cosine[0] == 1.0
    assert cosine[5] == pytest.approx(0.5)
    assert [factor("constant", 0.1, s, 10) for s in range(10)] == [1.0] * 10


def test_the_schedule_reaches_the_optimiser(recipe: Make) -> None:
    notes = Notes()
    train(recipe(warmup=0.25), notes)
    assert notes.rates == pytest.approx([0.01 * factor("linear", 0.25, s, 12) for s in range(12)])


# ---------------------------------------------------------------------- order
@pytest.mark.parametrize("lengths", [None, tuple((i * 7) % 23 for i in range(101))])
def test_every_epoch_sees_every_row_once(lengths: tuple[int, ...] | None) -> None:
    order = Order(101, 8, seed=5, lengths=lengths)
    first, second = ([order.step(e * 13 + i) for i in range(13)] for e in (0, 1))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(101))
    assert first != second
    assert [order.step(i) for i in range(13)] == first
    assert Order(101, 8, seed=6, lengths=lengths).step(0) != first[0]


def test_bucketing_saves_padding() -> None:
    lengths = tuple((i * 37) % 50 + 1 for i in range(1000))
    padded = {
        given: sum(8 * max(lengths[r] for r in Order(1000, 8, 0, given).step(s)) for s in range(125))
        for given in (None, lengths)
    }
    assert padded[lengths] < 0.7 * padded[None]


# ---------------------------------------------------------------------- costs
def test_saved_bytes_of_a_toy_by_hand() -> None:
    """tanh keeps its output (3 × 4 floats); the two products keep their inputs x (3 × 5) and the same tanh."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3, 5)
    _, saved = saved_for_backward(lambda: model(x).sum(), model)
    assert saved == 4 * (3 * 5 + 3 * 4)
    for p in model[0].parameters():
        p.requires_grad_(False)  # nothing below the second layer needs a gradient: its input alone is kept
    _, saved = saved_for_backward(lambda: model(x).sum(), model)
    assert saved == 4 * 3 * 4


def test_watch_counts_what_lives_at_once() -> None:
    x = torch.zeros(1000)
    watch = Watch(storages([x]))
    with watch:
        a = x + 1
        b = a * 2
        view = b[:10]
        del a
        c = b + 1
        del b
    assert watch.peak == 8000
    assert watch.now == 8000, "the view keeps its storage"
    del view, c
    assert watch.now == 0


def test_watch_agrees_with_the_profiler() -> None:
    from torch.profiler import ProfilerActivity, profile

    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64))
    x = torch.randn(512, 64)
    model(x).sum().backward()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model(x).sum().backward()
    model.zero_grad()
    events = sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"),
                    key=lambda e: e.start_ns())  # fmt: skip
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    watch = Watch(storages([x, *model.parameters()]))
    with watch:
        model(x).sum().backward()
    assert watch.peak == pytest.approx(peak, rel=0.02)


def test_step_memory_adds_up() -> None:
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[0].weight.requires_grad_(False)
    x = torch.randn(3, 5)
    saved, peak = step_memory(lambda: model(x).sum(), model, {"x": x}, AdamW([model[1].weight]))
    assert saved == 4 * 3 * 4
    held, moments = 4 * (20 + 8), 2 * 4 * 8
    hidden, out, loss, grad = 4 * 12, 4 * 6, 4, 4 * 8
    assert held + moments + hidden + grad < peak <= held + moments + hidden + out + 4 * loss + 2 * out + 2 * grad
    assert model[1].weight.grad is None


# ---------------------------------------------------------------------- frozen features
@pytest.mark.parametrize("regression", [False, True])
def test_cached_features_give_what_the_whole_model_gives(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regression: bool
) -> None:
    from tiny_task import make_data

    from inlay.train.headonly import HeadOnly

    fields: dict[str, Any] = {"method": "linearprobe", "base_dropout": False, "epochs": 3}
    if regression:
        fields["data"] = make_data(tmp_path / "scores", regression=True)
    parts = []
    original = HeadOnly.above
    monkeypatch.setattr(HeadOnly, "above", lambda self, batch: parts.append(1) or original(self, batch))
    cached = train(recipe(**fields, output=str(tmp_path / "a")))
    assert len(parts) > cached.steps
    assert cached.cache["kept"] == "what enters 'classifier'"
    plain = train(recipe(**fields, output=str(tmp_path / "b"), cache=False))
    assert plain.cache == {"why_not": "cache is off"}
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
    assert cached.metrics == pytest.approx(plain.metrics, rel=1e-4, abs=1e-6)
    assert evaluate(str(cached.folder)) == pytest.approx(cached.metrics, rel=1e-5)


def test_features_are_not_cached_where_something_random_is_below(recipe: Make) -> None:
    notes = Notes()
    assert "random" in train(recipe(method="linearprobe"), notes).cache["why_not"]
    assert "base_dropout: false" in notes.said[0]
