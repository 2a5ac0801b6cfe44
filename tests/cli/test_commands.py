"""Commands as a user types them, in this process."""

import json
import subprocess
import sys

import pytest

from inlay.cli import main


def test_methods_json_has_what_programs_need(run):
    status, out, _ = run("methods", "--json")
    found = json.loads(out)
    assert status == 0
    assert {"lora", "vera", "dora", "ia3", "bitfit", "loreft", "prompttuning", "prefixtuning"} <= {
        m["name"] for m in found
    }
    for m in found:
        assert {"name", "site", "paper", "equation", "options", "mergeable"} <= set(m)
        assert all({"name", "type", "default", "doc"} <= set(o) for o in m["options"])
        assert m["equation"]
        assert m["paper"]


def test_one_method_shows_its_options(run):
    status, out, _ = run("methods", "LoRA")
    assert status == 0
    assert "rank_stabilized" in out
    assert "2106.09685" in out


def test_plan_of_rows_of_which_one_has_no_place(run, tmp_path):
    recipe = tmp_path / "rows.yaml"
    recipe.write_text("{model: minilm, data: x, methods: [lora, llamaadapter]}", encoding="utf-8")
    first, second = json.loads(run("plan", str(recipe), "--no-memory", "--json")[1])
    assert first["adapter_parameters"] == 73_728
    assert "has no causal attention" in second["refused"]
    recipe.write_text("{model: minilm, data: x, methods: [longlora, llamaadapter]}", encoding="utf-8")
    status, _, error = run("plan", str(recipe), "--no-memory")
    assert status == 2
    assert "has no causal attention" in error


def test_plan_of_the_vera_row(run):
    status, out, _ = run(
        "plan", "--arch", "roberta-base", "--method", "vera", "--set", "r=1024",
        "--where", "attn.q,attn.v", "--batch", "2", "--length", "16", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert status == 0
    assert found["adapter_parameters"] == 43_008
    assert found["head_parameters"] == 592_130
    assert found["adapter_bytes"] == 4 * 43_008
    # weights alone are a lower bound
    assert found["peak_training_bytes"] > 4 * (found["base_parameters"] + found["adapter_parameters"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["plan", "--arch", "roberta-bass", "--method", "lora"], "did you mean 'roberta-base'"),
        (["plan", "--arch", "roberta-base", "--method", "lorra"], "did you mean 'lora'"),
        (["plan", "--arch", "roberta-base", "--method", "lora", "--set", "rank=4"], "its options: "),
        (["plan", "--arch", "roberta-base", "--method", "lora", "--set", "r=0"], "at least 1"),
        (["plan", "--arch", "roberta-base", "--method", "lora", "--set", "r=many"], "must be int"),
        (["plan", "--arch", "roberta-base", "--method", "lora", "--where", "attn.w"], "matches nothing"),
        (["plan", "--arch", "roberta-base", "--method", "lora(", "--no-memory"], "cannot read the method"),
        (["plan"], "needs a recipe"),
        (["methods", "lorra"], "did you mean 'lora'"),
        (["inspect", "/nowhere"], "no such folder"),
        (["train", "--model", "minilm", "--data", "trec"], "needs 'method'"),
        (["train", "/nowhere.yaml"], "cannot read the recipe"),
        (["plan", "--arch", "minilm", "--method", "lora", "--length", "4096"], "takes 512 tokens at most"),
        (["plan", "--arch", "roberta-base", "--method", "lora", "--length", "513"], "takes 512 tokens at most"),
        (["plan", "--arch", "vit-base", "--method", "lora", "--length", "100"], "no multiple"),
        (["plan", "--arch", "minilm", "--method", "lora", "--layers", "0,99"], "no layer 99: they are 0 to 5"),
        (["plan", "--arch", "minilm", "--method", "lora", "--layers", "x"], "'layers' must be list[int]"),
        (["plan", "--arch", "minilm", "--method", "lora", "--batch", "0"], "at least 1"),
        (["plan", "--arch", "minilm", "--method", "lora", "--dtype", "int8"], "known: float32, bfloat16, float16"),
        (["data", "fetch"], "needs a name"),
        (["data", "fetch", "trek"], "did you mean 'trec'"),
        (["data", "list", "--limit", "3"], "has no meaning here"),
        (["data", "preview", "trec"], "--model"),
        (["data", "preview", "trec", "--model", "minilm", "--samples", "0"], "at least 1"),
        (["models", "fetch", "mini"], "did you mean 'minilm'"),
        (["models", "lst"], "did you mean 'list'"),
        (["evaluate", "/nowhere", "--batch", "0"], "at least 1"),
        (["evaluate", "/nowhere"], "no such folder"),
        (["merge", "/nowhere"], "required: --output"),
        (["export", "/nowhere", "--output", "x", "--format", "onnx"], "known: merged, peft"),
        (["compare", "--model", "minilm", "--data", "trec", "--methods", "lora", "--set", "r=4"], "for one method"),
        (["compare", "--model", "minilm", "--data", "trec", "--methods", "lora", "--seeds", "0,0"], "twice"),
        (["train", "--learning_rate", "3"], "did you mean '--learning-rate'"),
        (["methods", "lora", "vera"], "'vera' is one word too many"),
        (["methdos"], "did you mean 'methods'"),
        ([], "inlay --help"),
    ],
)
def test_mistakes_are_one_clear_line_and_status_2(run, argv, says):
    status, out, err = run(*argv)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    assert not out


def test_an_unknown_key_in_a_recipe_lists_the_known_ones(run, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: minilm\ndata: trec\nmethod: lora\nlearing_rate: 1e-3\n")
    status, _, err = run("train", str(recipe))
    assert status == 2
    assert "learing_rate" in err
    assert "learning_rate" in err
    assert "max_length" in err


def test_listings(run):
    _, out, _ = run("models", "--json")
    models = {m["name"]: m for m in json.loads(out)}
    assert {
        "minilm",
        "gte-small",
        "stories15m",
        "smollm2-135m-instruct",
        "dinov2-small",
        "mobilenetv2",
        "resnet50",
    } <= set(models)
    assert "MRI" in json.dumps(models["dinov2-small"])
    _, out, _ = run("data", "--json")
    names = {d["name"] for d in json.loads(out)}
    assert {
        "trec",
        "rotten-tomatoes",
        "snips",
        "stsb",
        "snli",
        "instructlab",
        "gsm8k",
        "cifar10",
        "grocery",
        "cxr",
    } <= names


def test_a_recipe_for_another_command_is_told_so(run, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: minilm\ndata: trec\nmethods: [lora, vera]\n")
    assert "a recipe for `inlay compare`" in run("train", recipe)[2]
    recipe.write_text("model: minilm\ndata: trec\nmethod: lora\n")
    assert "a recipe for `inlay train`" in run("compare", recipe)[2]
    recipe.write_text("model: minilm\ndata: [trec\n")
    assert "line 3" in run("train", recipe)[2]


def test_flags_replace_fields_of_a_planned_recipe(run, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: roberta-base\ndata: none-such\nmethod: lora\n")
    before = json.loads(run("plan", recipe, "--no-memory", "--json")[1])
    after = json.loads(
        run("plan", recipe, "--no-memory", "--json", "--method", "lora", "--set", "r=4", "--layers", "0")[1]
    )
    assert before["adapter_parameters"] == 294_912
    assert after["adapter_parameters"] == 294_912 / 2 / 12


def test_help_of_every_command_is_there(capsys):
    for name in ("methods", "models", "data", "plan", "train", "compare", "evaluate", "merge", "export", "inspect"):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert name in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m inlay methods --json | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[", "0"]
    assert not done.stderr
