"""From one's own files to a model that anything opens, by commands alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import inlay
import inlay.models


@pytest.fixture
def own(tiny, tmp_path, monkeypatch) -> Path:
    """The current folder, with a table whose columns are called otherwise."""
    monkeypatch.chdir(tmp_path)
    lines = (tiny / "data" / "train.csv").read_text().splitlines()
    Path("mine.csv").write_text("\n".join(["sentence,animal", *lines[1:]]) + "\n")
    return tmp_path


def trained(run, tiny, *more) -> dict:
    columns = ("--columns", "text=sentence,label=animal")
    status, out, err = run(
        "train", "--model", tiny / "model", "--data", "mine.csv", *columns, "--method", "lora", "--set", "r=2",
        "--steps", 6, "--batch", 8, "--output", "piece", "--json", *more,
    )  # fmt: skip
    assert status == 0, err
    return json.loads(out)


def test_train_evaluate_inspect_merge_and_open_elsewhere(own, tiny, run):
    found = trained(run, tiny)
    assert Path("piece/adapter.safetensors").stat().st_size == found["file_bytes"]

    status, out, _ = run("evaluate", "piece", "--json")
    assert status == 0
    assert json.loads(out) == pytest.approx(found["metrics"])

    status, out, _ = run("inspect", "piece")
    assert status == 0
    assert "bert.encoder.layer.0.attention.self.query.A" in out

    status, out, _ = run("merge", "piece", "--output", "merged", "--json")
    assert status == 0
    assert json.loads(out)["difference"] < 1e-5
    assert oct(Path("merged/model.safetensors").stat().st_mode)[-3:] == "644"
    model = AutoModelForSequenceClassification.from_pretrained("merged").eval()
    inputs = AutoTokenizer.from_pretrained("merged")("the red cat sleeps", return_tensors="pt")
    adapted = inlay.models.open(
        str(tiny / "model"), "text-classification", labels=["avian", "canine", "feline"]
    ).model.eval()
    inlay.load(adapted, "piece")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, adapted(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert model.config.id2label == {0: "avian", 1: "canine", 2: "feline"}

    status, _, _ = run("export", "piece", "--format", "peft", "--output", "peft")
    assert status == 0
    assert load_file("peft/adapter_model.safetensors")
    for command in (("export", "piece", "--format", "peft"), ("merge", "piece")):
        status, _, err = run(*command, "--output", "peft")
        assert (status, err.count("\n")) == (2, 1)
        assert "peft exists and is not an empty folder" in err


def test_all_rows_of_another_file_are_evaluated_and_its_classes_may_be_fewer(own, tiny, run):
    trained(run, tiny)
    Path("new.csv").write_text("text,label\nthe red cat,feline\nthe bird sings,avian\na cat,feline\n")
    status, out, _ = run("evaluate", "piece", "--data", "new.csv", "--json")
    assert status == 0
    assert json.loads(out)["accuracy"] * 3 == pytest.approx(round(json.loads(out)["accuracy"] * 3))
    Path("new.csv").write_text("text,label\nthe red cat,feline\nthe fish,aquatic\n")
    status, _, err = run("evaluate", "piece", "--data", "new.csv")
    assert status == 2
    assert "the adapter's labels are ['avian', 'canine', 'feline']" in err


def test_the_plan_foretells_the_file(own, tiny, run):
    found = trained(run, tiny)
    Path("plan.yaml").write_text(
        f"model: {tiny / 'model'}\ndata: mine.csv\ncolumns: {{text: sentence, label: animal}}\n"
        "method: lora(r=2)\nbatch: 8\n"
    )
    status, out, _ = run("plan", "plan.yaml", "--json")
    plan = json.loads(out)
    assert status == 0
    assert plan["adapter_parameters"] == found["adapter_parameters"]
    assert plan["head_parameters"] == found["head_parameters"] == 3 * 17  # three classes, from the data
    tensors = sum(t.numel() * t.element_size() for t in load_file("piece/adapter.safetensors").values())
    assert plan["adapter_bytes"] + plan["head_bytes"] == tensors
    assert plan["file_bytes"] == pytest.approx(found["file_bytes"], abs=1500)  # recipe and metrics differ in length


def test_a_comparison_is_planned_row_by_row(own, tiny, run):
    Path("rows.yaml").write_text(
        f"model: {tiny / 'model'}\ndata: mine.csv\ncolumns: {{text: sentence, label: animal}}\n"
        "methods: [lora(r=2), {method: bitfit, label: biases}]\n"
    )
    status, out, _ = run("plan", "rows.yaml", "--no-memory", "--json")
    assert status == 0
    assert [p["label"] for p in json.loads(out)] == ["LoRA(r=2)", "biases"]
    status, out, _ = run("plan", "rows.yaml", "--no-memory")
    assert status == 0
    assert "biases" in out


def test_a_run_that_failed_before_its_first_step_does_not_hold_the_folder(own, tiny, run):
    status, _, err = run(
        "train", "--model", tiny / "model", "--data", tiny / "data", "--method", "lora", "--where", "attn.w",
        "--output", "piece",
    )  # fmt: skip
    assert status == 2
    assert "matches nothing" in err
    trained(run, tiny)
    status, _, err = run("train", "--model", tiny / "model", "--data", tiny / "data", "--method", "lora",
                         "--output", "piece")  # fmt: skip
    assert status == 2
    assert "another recipe" in err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--output", "mine.csv"], "mine.csv"),
        (["--output", "mine.csv/deeper"], "mine.csv/deeper"),
        (["--columns", "text=sentense,label=animal"], "Did you mean 'sentence'?"),
        (["--columns", "text"], "must be a mapping"),
        (["--limit", "train=many"], "must be int"),
        (["--layers", "7"], "no layer 7: they are 0 to 1"),
        (["--metric", "accurracy"], "did you mean 'accuracy'"),
        (["--max-length", "64"], "outside 1 to 32"),
        (["--data", "none.csv"], "none.csv"),
        (["--set", "rank=2"], "its options: dropout, r, alpha"),
    ],
)
def test_mistakes_in_training_are_one_sentence(own, tiny, run, more, says):
    status, out, err = run(
        "train", "--model", tiny / "model", "--data", "mine.csv", "--columns", "text=sentence,label=animal",
        "--method", "lora", "--steps", 1, "--output", "piece", *more,
    )  # fmt: skip
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    assert not out


def compared(run, tiny, *more):
    return run(
        "compare", "--model", tiny / "model", "--data", tiny / "data", "--steps", 2, "--workers", 1, "--output", "grid",
        "--json", *more,
    )  # fmt: skip


def test_a_comparison_writes_its_report_and_trains_nothing_twice(own, tiny, run):
    status, out, _ = compared(run, tiny, "--methods", "lora(r=2), bitfit")
    assert status == 0
    assert {row["method"] for row in json.loads(out)} == {"LoRA(r=2)", "BitFit"}
    assert Path("grid/report.html").stat().st_size > 10_000
    status, out, err = compared(run, tiny, "--methods", "lora(r=2), bitfit")
    assert status == 0
    assert "2 of 2 cells are finished already" in err


def test_a_comparison_in_which_nothing_could_be_trained_is_an_error(own, tiny, run):
    status, out, err = compared(run, tiny, "--methods", "lora", "--learning-rate", "1e30")
    assert status == 2
    assert "no method could be trained" in err
    assert json.loads(out)[0]["error"].count("lower the learning rate")
    status, _, err = compared(run, tiny, "--methods", "lora", "--output", "mine.csv")
    assert status == 2
    assert "a file is in its place" in err


def test_preview_shows_what_the_model_will_see(own, tiny, run):
    words = ("--model", tiny / "model", "--columns", "text=sentence,label=animal")
    status, out, _ = run("data", "preview", "mine.csv", *words, "--split", "test", "--samples", 2, "--json")
    assert status == 0
    samples = json.loads(out)
    assert len(samples) == 2
    assert samples[0]["tokens"][0] == "[CLS]"
    status, out, _ = run("data", "preview", "mine.csv", *words)
    assert status == 0
    assert "label: " in out
    assert "text-classification" in out
    status, _, err = run("data", "preview", "mine.csv", *words, "--split", "tests")
    assert status == 2
    assert "train, validation, test" in err
    Path("rows.yaml").write_text(f"model: {tiny / 'model'}\ndata: {tiny / 'data'}\nmethods: [lora]\n")
    assert run("data", "preview", "rows.yaml")[0] == 0


def test_another_base_is_refused_unless_any_will_do(own, tiny, run):
    trained(run, tiny)
    other = AutoModelForSequenceClassification.from_pretrained(tiny / "model")
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight.mul_(2.0)
    other.save_pretrained("other")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained("other")
    status, _, err = run("evaluate", "piece", "--base", "other")
    assert status == 2
    assert "trained on another base" in err
    assert run("evaluate", "piece", "--base", "other", "--any-base")[0] == 0
    assert run("merge", "piece", "--base", "other", "--any-base", "--output", "merged")[0] == 0
