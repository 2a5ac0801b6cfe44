"""Commands as a user types them, in this process."""

import json

import pytest

from inlay.cli import main


def run(capsys, *argv):
    status = main(argv)
    out = capsys.readouterr()
    return status, out.out, out.err


def test_methods_json_has_what_programs_need(capsys):
    status, out, _ = run(capsys, "methods", "--json")
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


def test_one_method_shows_its_options(capsys):
    status, out, _ = run(capsys, "methods", "LoRA")
    assert status == 0
    assert "rank_stabilized" in out
    assert "2106.09685" in out


def test_plan_of_the_vera_row(capsys):
    status, out, _ = run(
        capsys, "plan", "--arch", "roberta-base", "--method", "vera", "--set", "r=1024",
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
        (["data", "fetch"], "needs a name"),
    ],
)
def test_mistakes_are_one_clear_line_and_status_2(capsys, argv, says):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    assert not out


def test_an_unknown_key_in_a_recipe_lists_the_known_ones(capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: minilm\ndata: trec\nmethod: lora\nlearing_rate: 1e-3\n")
    status, _, err = run(capsys, "train", str(recipe))
    assert status == 2
    assert "learing_rate" in err
    assert "learning_rate" in err
    assert "max_length" in err


def test_listings(capsys):
    _, out, _ = run(capsys, "models", "--json")
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
    _, out, _ = run(capsys, "data", "--json")
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
