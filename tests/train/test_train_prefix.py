"""States of frozen blocks that are computed once: the same numbers as the whole model's, or the whole model."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prefix_tasks import Augmented, work
from test_train_loop import Notes
from test_train_resume import KilledAt, equal, in_child, limit_files, tensors
from tiny_task import make_model

from inlay import adapt
from inlay.core.errors import InlayError
from inlay.data.chat import IGNORED
from inlay.data.choices import ChoiceRows
from inlay.evaluate import evaluate
from inlay.evaluate.predict import Whole
from inlay.recipe import Recipe, load_recipe, parse_value
from inlay.train import train
from inlay.train.frozen import Frozen, Outcome, outcome
from inlay.train.prefix import Prefix, aside
from inlay.train.source import Chosen, source_for
from inlay.train.store import FOLDER, Store
from inlay.work import Work

Make = Callable[..., Recipe]
TOP: dict[str, dict[str, Any]] = {
    "bert": {}, "distilbert": {}, "llama": {}, "gpt2": {}, "gemma2": {}, "vit": {}, "dinov2": {},
    "mamba": {"where": ["mixer.in"]}, "resnet": {"where": ["block[3].conv"], "layers": None},
}  # fmt: skip


def chosen(made: Work, method: Any = "lora(r=2)", said: list[str] | None = None, **fields: Any) -> tuple[Any, Chosen]:
    """An adapter in the topmost of four blocks, and the source of a run of three passes."""
    placing = {"layers": [3], **{k: fields.pop(k) for k in ("where", "layers", "head") if k in fields}}
    adapter = adapt(made.model, method, placing.pop("where", None), **placing)
    recipe = Recipe(**{"model": "m", "data": "d", "method": method, "base_dropout": False, **fields})  # type: ignore[arg-type]
    return adapter, source_for(made, adapter, recipe, 3.0, (said if said is not None else []).append)


def both(made: Work, adapter: Any, source: Any, rows: list[int]) -> tuple[Outcome, Outcome]:
    """What a source and the whole model make of some rows, with the adapter far from its start."""
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.3)
    trained = list(adapter.parameters())
    found = [outcome(s, s.batch("train", rows), trained) for s in (source, Whole(made))]
    if found[0].logits.dim() == 3:
        real = made.batch("train", rows)["attention_mask"].bool()
        found = [Outcome(o.logits[real], o.loss, o.gradients) for o in found]
    return found[0], found[1]


def same(a: Outcome, b: Outcome, tolerance: float = 1e-5) -> bool:
    return all(
        torch.allclose(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))
        for x, y in ((a.logits, b.logits), (a.loss, b.loss), (a.gradients, b.gradients))
    )


# ---------------------------------------------------------------------- the same numbers
@pytest.mark.parametrize("kind", TOP)
def test_kept_states_give_what_the_whole_model_gives(kind: str) -> None:
    """Logits, loss and gradients, for rows in another order and with other padding than when they were computed."""
    made = work(kind)
    adapter, found = chosen(made, **TOP[kind])
    assert isinstance(found.source, Prefix)
    assert found.about["kept"] == "what leaves the lowest 3 of 4 blocks"
    for rows in ([5, 1, 0, 7], [2, 9]):
        assert same(*both(made, adapter, found.source, rows))
    kept, every = found.source.found["train"].states, made.lengths("train")
    assert kept.total == (10 if every is None else sum(every)), "padding is not kept"


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_padding_on_the_left(kind: str) -> None:
    made = work(kind, left=True)
    adapter, found = chosen(made, **TOP[kind])
    assert isinstance(found.source, Prefix)
    assert same(*both(made, adapter, found.source, [5, 1, 0, 7]))


@pytest.mark.parametrize(
    ("kind", "method", "where", "blocks"),
    [
        ("llama", "llamaadapter", None, 3),  # attends beside the topmost attentions alone
        ("bert", "pfeiffer(r=2)", None, 3),
        ("bert", ["bitfit", "lora(r=2)"], ["block[3].mlp.up"], 3),
        ("llama", "lora(r=2)", ["block[3].mlp.down", "block[1].attn.o"], 1),
        ("gpt2", "full", ["head"], 4),
        ("bert", "lora(r=2)", ["pool"], 4),
        ("llama", "normtuning", ["block[2].norm1"], 2),
    ],
)
def test_the_lowest_place_is_found_for_every_kind_of_method(kind: str, method: Any, where: Any, blocks: int) -> None:
    made = work(kind)
    adapter, found = chosen(made, method, where=where, layers=None if where else [3])
    assert found.about["kept"] == f"what leaves the lowest {blocks} of 4 blocks"
    assert same(*both(made, adapter, found.source, [5, 1, 0, 7]))


def test_rows_with_answers_to_choose_from() -> None:
    """Each answer of a row is a row of the batch, and T-Few compares them."""
    questions = []
    for i in range(6):
        ids = torch.arange(3, 6 + i)
        answers = [[*ids.tolist(), word] for word in (20, 21, 22)]
        questions.append([(a, [IGNORED] * len(ids) + a[-1:]) for a in answers])
    made = work("llama", rows=ChoiceRows(questions))
    adapter, found = chosen(made, ["lora(r=2)", "tfew"])
    assert isinstance(found.source, Prefix)
    assert "choices" in found.source.batch("validation", [0])
    assert same(*both(made, adapter, found.source, [5, 1, 0]))


def test_gradient_checkpointing_runs_upper_blocks_again_from_kept_states() -> None:
    made = work("llama")
    adapter, found = chosen(made)
    made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    assert isinstance(found.source, Frozen)
    found.source.prepare("train")
    made.model.train()
    assert same(*both(made, adapter, found.source, [5, 1, 0, 7]))


def test_blocks_stand_aside_for_the_context_alone() -> None:
    blocks = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    own = blocks[1].__dict__["forward"] = lambda x: x + 1  # as other libraries' hooks leave it
    outputs = []

    def interrupted() -> None:
        with aside(blocks, [None, (None,)], torch.zeros(1)):
            outputs.extend(block(torch.ones(2)) for block in blocks)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        interrupted()
    assert torch.equal(outputs[0], torch.zeros(1))
    assert outputs[1][1] is None
    assert "forward" not in blocks[0].__dict__
    assert blocks[1].__dict__["forward"] is own


# ---------------------------------------------------------------------- the whole model, and why
@pytest.mark.parametrize(
    ("kind", "method", "placing", "why"),
    [
        ("llama", "full", {"where": ["embed"], "layers": None}, "no frozen block lies below"),
        ("llama", "prompttuning(tokens=2)", {"layers": None}, "no frozen block lies below"),
        ("llama", "prefixtuning(tokens=2)", {"layers": None}, "no frozen block lies below"),
        ("vit", "vpt(tokens=2)", {"layers": None}, "no frozen block lies below"),
        ("vit", "visualprompt", {"layers": None}, "no frozen block lies below"),
        ("bert", "sidetuning", {"layers": None}, "no frozen block lies below"),
        ("bert", "unipt", {"layers": None}, "no frozen block lies below"),
        ("llama", "longlora(groups=2)", {"layers": None}, "no frozen block lies below"),
        ("gpt2", "full", {"where": ["embed"], "layers": None, "head": None}, "no frozen block lies below"),
        ("bert", "lora(r=2)", {"layers": [0, 3]}, "no frozen block lies below"),
        ("t5", "lora(r=2)", {}, "a T5Block puts out more than hidden states"),
    ],
)
def test_what_hears_or_trains_something_below_gets_the_whole_model(
    kind: str, method: Any, placing: dict[str, Any], why: str
) -> None:
    made = work(kind)
    said: list[str] = []
    _, found = chosen(made, method, said, cache="memory", **placing)
    assert isinstance(found.source, Whole)
    assert why in found.about["why_not"]
    assert why in said[-1], "it was asked for"


def test_states_that_hang_on_padding_are_found_out() -> None:
    """GPT-2 counts positions from the left edge, padding included."""
    said: list[str] = []
    _, found = chosen(work("gpt2", left=True), said=said)
    assert found.about["why_not"].endswith("the model computes something else")
    assert found.about["why_not"] in said[-1]


def test_augmented_rows_are_found_out() -> None:
    _, found = chosen(work("vit", rows=Augmented()))
    assert found.about == {"why_not": "a row is not the same when it is read again"}


def test_dropout_below_is_found_out() -> None:
    """Dropout of the embeddings alone; without base_dropout there is none."""
    made = work("bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0)
    _, found = chosen(made, base_dropout=True)
    assert "random numbers" in found.about["why_not"]
    silent = work("llama")
    assert "kept" in chosen(silent, base_dropout=True)[1].about, "it has none"


def test_off_is_off(tmp_path: Path) -> None:
    """As YAML reads it, in files and on the command line."""
    assert parse_value("off") is False
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\ndata: d\nmethod: lora\ncache: off\n")
    assert load_recipe(file, Recipe).cache is False


def test_auto_keeps_nothing_where_little_is_gained() -> None:
    said: list[str] = []
    made = work("bert", num_hidden_layers=6)
    adapter = adapt(made.model, "lora(r=2)", layers=[1])
    few = {"model": "m", "data": "d", "method": "lora", "base_dropout": False}
    assert source_for(made, adapter, Recipe(**few), 3.0, said.append).about["why_not"].startswith("only 1 of 6")
    assert "less than twice" in source_for(made, adapter, Recipe(**few), 1.9, said.append).about["why_not"]
    assert said == []
    assert "kept" in source_for(made, adapter, Recipe(**few, cache="memory"), 1.0, said.append).about


# ---------------------------------------------------------------------- where and how much
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_store_gives_back_what_it_was_given(tmp_path: Path, on_disk: bool, dtype: torch.dtype) -> None:
    counts = [2, 1, 4, 3]
    rows = [torch.randn(n, 5).to(dtype) for n in counts]
    store = Store(counts, torch.Size([5]), dtype, tmp_path / "new" / "a.bin" if on_disk else None)
    store.add([3, 0], torch.cat([rows[3], rows[0]]))
    store.add([1, 2], torch.cat([rows[1], rows[2]]))
    assert torch.equal(store.take([2, 0, 2]), torch.cat([rows[2], rows[0], rows[2]]))
    if on_disk:
        assert (tmp_path / "new" / "a.bin").read_bytes()[:2] != b"PK"
        assert (tmp_path / "new" / "a.bin").stat().st_size == 10 * 5 * dtype.itemsize, "the numbers and nothing else"


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"cache_limit": 8e-6}, "in memory"),
        ({"cache_limit": 6e-6}, "on disk"),  # 7,168 bytes
        ({"cache_limit": 8e-6, "cache": "disk"}, "on disk"),
        ({"cache_limit": 4e-6, "cache_dtype": "bfloat16"}, "in memory"),
        ({"cache_limit": 6e-6, "cache": "memory"}, "cache_limit leaves 6e-06"),
        ({"cache_limit": 6e-7}, "cache_limit leaves 6e-06"),
    ],
)
def test_the_limit_holds(fields: dict[str, Any], place: str, tmp_path: Path) -> None:
    said: list[str] = []
    _, found = chosen(work("bert"), said=said, output=str(tmp_path), **fields)
    assert place in (found.about["place"] if "kept" in found.about else found.about["why_not"])
    assert place in said[-1]


def test_bfloat16_takes_half_the_bytes_and_rounds() -> None:
    made = work("bert")
    adapter, found = chosen(made, cache_dtype="bfloat16")
    assert (found.about["bytes"], found.about["dtype"]) == (7168 // 2, "bfloat16")
    pair = both(made, adapter, found.source, [5, 1, 0, 7])
    assert same(*pair, tolerance=0.05)
    assert not same(*pair, tolerance=1e-4)
    assert found.source.batch("train", [0])["states"].dtype == torch.float32


# ---------------------------------------------------------------------- runs
FIELDS: dict[str, Any] = {"layers": [1], "base_dropout": False, "epochs": 2, "batch": 4, "accumulate": 2}


@pytest.mark.parametrize(
    "more",
    [{}, {"method": ["lora(r=2)", "ist(every=3, share=0.5)"]}, {"quantize": "int8"},
     {"precision": "bfloat16"}, {"method": "eva(r=2)"}],
    ids=["lora", "ist", "int8", "bfloat16", "eva"],
)  # fmt: skip
def test_a_run_from_kept_states_is_the_run_without(recipe: Make, tmp_path: Path, more: dict[str, Any]) -> None:
    """Shuffled rows, dropout in the adapter, two batches a step, evaluation every epoch."""
    notes = Notes()
    kept = train(recipe(**{**FIELDS, **more}, output=str(tmp_path / "a")), notes)
    plain = train(recipe(**{**FIELDS, **more, "cache": False}, output=str(tmp_path / "b")))
    assert kept.cache["kept"] == "what leaves the lowest 1 of 2 blocks"
    assert any(kept.cache["kept"] in text for text in notes.said)
    assert json.loads((tmp_path / "a" / "result.json").read_text())["cache"] == kept.cache
    assert plain.cache == {"why_not": "cache is off"}
    a, b = tensors(str(tmp_path / "a")), tensors(str(tmp_path / "b"))
    loose = 0.05 if "precision" in more else 1e-4
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=loose, atol=loose)
    assert [p["loss"] for p in kept.curve] == pytest.approx([p["loss"] for p in plain.curve], rel=loose)
    if "precision" not in more:
        assert evaluate(str(kept.folder)) == kept.metrics == plain.metrics
    assert not (tmp_path / "a" / FOLDER).exists()


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(recipe: Make, tmp_path: Path, cache: str) -> None:
    fields = {**FIELDS, "cache": cache}
    train(recipe(**fields, output=str(tmp_path / "a")))
    disturbed = recipe(**fields, output=str(tmp_path / "b"))
    for at in (1, 7):
        assert in_child(lambda at=at: train(disturbed, KilledAt(at))) == -signal.SIGKILL
    assert (tmp_path / "b" / FOLDER).exists() == (cache == "disk"), "a kill leaves the file"
    train(disturbed)
    assert equal(tensors(str(tmp_path / "a")), tensors(str(tmp_path / "b")))
    assert not (tmp_path / "b" / FOLDER).exists(), "the next run removes it"


def test_a_run_of_before_there_was_a_cache_goes_on(recipe: Make, tmp_path: Path) -> None:
    disturbed = recipe(**FIELDS)
    assert in_child(lambda: train(disturbed, KilledAt(5))) == -signal.SIGKILL
    mark = tmp_path / "out" / "run.json"
    document = json.loads(mark.read_text())
    document["recipe"] = {k: v for k, v in document["recipe"].items() if not k.startswith("cache")}
    mark.write_text(json.dumps(document))
    assert train(disturbed).steps == 12


def test_a_full_disk_is_a_clear_error(recipe: Make) -> None:
    made = recipe(**FIELDS, cache="disk")

    def run() -> None:
        limit_files(8000)
        with pytest.raises(InlayError, match="cache: off"):
            train(made)

    assert in_child(run) == 0
    assert train(made).steps == 12


def test_a_linear_probe_of_states_of_several_lengths() -> None:
    """Heads that read the whole sequence (RoBERTa's) get it padded again."""
    made = work("roberta")
    adapter, found = chosen(made, "linearprobe", layers=None)
    assert found.about["kept"] == "what enters 'classifier'"
    assert same(*both(made, adapter, found.source, [5, 1, 0, 7]))


def test_training_from_checkpointed_blocks(recipe: Make, tmp_path: Path) -> None:
    """Activation checkpointing needs training mode, and so a base without dropout."""
    model = make_model(tmp_path / "model", dropout=0.0)
    fields = {**FIELDS, "model": model, "base_dropout": True, "gradient_checkpointing": True}
    kept = train(recipe(**fields, output=str(tmp_path / "a")))
    train(recipe(**fields, cache=False, output=str(tmp_path / "b")))
    assert "kept" in kept.cache
    a, b = tensors(str(tmp_path / "a")), tensors(str(tmp_path / "b"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
