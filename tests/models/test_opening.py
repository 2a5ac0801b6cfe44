"""Opening models: tasks and heads, names and paths, errors, silence. Small models made here."""

import json
import logging

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

import inlay.models
from inlay.models import ModelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT without a head, with its tokenizer's vocabulary."""
    path = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, pad_token_id=0
    )
    BertModel(config).save_pretrained(path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (path / "vocab.txt").write_text("\n".join(words))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 64})
    )
    return path


def test_fresh_head_depends_on_the_seed_alone(folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = inlay.models.open(folder, "text-classification", labels=["no", "yes", "perhaps"], seed=1)
    assert torch.equal(torch.get_rng_state(), before), "the global random state is left alone"
    torch.manual_seed(6)
    same = inlay.models.open(folder, "text-classification", num_labels=3, seed=1)
    other = inlay.models.open(folder, "text-classification", num_labels=3, seed=2)
    assert first.head == same.head == ["classifier"]
    assert torch.equal(first.model.classifier.weight, same.model.classifier.weight)
    assert not torch.equal(first.model.classifier.weight, other.model.classifier.weight)
    assert first.model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert not first.model.training


def test_missing_pooler_is_named(folder, tmp_path):
    model = BertModel.from_pretrained(folder, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    opened = inlay.models.open(tmp_path, "text-classification", num_labels=2)
    assert opened.head == ["bert.pooler", "classifier"]


def test_regression_and_features(folder):
    opened = inlay.models.open(folder, "regression")
    assert opened.model.config.num_labels == 1
    assert opened.model.config.problem_type == "regression"
    batch = opened.processor(["a b", "c"], padding=True, return_tensors="pt")
    assert opened.model(**batch, labels=torch.tensor([0.5, 1.0])).loss.ndim == 0
    assert inlay.models.open(folder, "features").head == []


def test_a_trained_head_is_kept_or_replaced_by_another_size(folder, tmp_path):
    trained = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    trained.save_pretrained(tmp_path)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    kept = inlay.models.open(tmp_path, "text-classification", num_labels=2)
    assert kept.head == []
    assert torch.equal(kept.model.classifier.weight, trained.classifier.weight)
    assert inlay.models.open(tmp_path, "text-classification", num_labels=4).head == ["classifier"]
    assert isinstance(inlay.models.open(tmp_path).model, BertForSequenceClassification)


def test_dtype(folder):
    assert inlay.models.open(folder, "features", dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="Unknown dtype 'int3'; known: float32"):
        inlay.models.open(folder, "features", dtype="int3")


def test_loading_is_silent(folder, capfd, caplog):
    with caplog.at_level(logging.INFO):
        inlay.models.open(folder, "text-classification", num_labels=3)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert caplog.records == []


def test_log_level_is_restored(folder):
    from transformers.utils import logging as log

    log.set_verbosity_info()
    try:
        inlay.models.open(folder, "features")
        assert log.get_verbosity() == log.INFO
    finally:
        log.set_verbosity_warning()


def test_gguf_file_is_converted_once(tmp_path, monkeypatch, capfd):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    config = LlamaConfig(
        vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    expected = LlamaForCausalLM(config).eval()
    write_gguf(gguf, tmp_path / "tiny.gguf", expected)
    opened = inlay.models.open(tmp_path / "tiny.gguf", "causal-lm")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(opened.model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    assert opened.note == "Dequantised from tiny.gguf."
    assert "converting tiny.gguf, once" in capfd.readouterr().err
    again = inlay.models.open(tmp_path / "tiny.gguf", "causal-lm")
    assert again.source == opened.source
    assert capfd.readouterr().err == ""
    opened.model.save_pretrained(tmp_path / "saved")


def test_what_is_no_gguf_file_is_told_so(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "junk.gguf").write_text("junk")
    with pytest.raises(ModelError, match=r"junk\.gguf cannot be converted: .*not a GGUF file"):
        inlay.models.open(tmp_path / "junk.gguf", "causal-lm")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()] == []


def write_gguf(gguf, path, model) -> None:
    """A float32 Llama in GGUF; its query and key rows are interleaved there."""
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_attention_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<unk>", "a", "b", "c", "d", "ab"])
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)

    def put(name: str, weight: torch.Tensor) -> None:
        writer.add_tensor(name, weight.detach().numpy().copy())

    def interleaved(weight: torch.Tensor) -> torch.Tensor:
        heads = c.num_attention_heads
        return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)

    put("token_embd.weight", model.model.embed_tokens.weight)
    put("output_norm.weight", model.model.norm.weight)
    put("output.weight", model.lm_head.weight)
    for i, layer in enumerate(model.model.layers):
        put(f"blk.{i}.attn_q.weight", interleaved(layer.self_attn.q_proj.weight))
        put(f"blk.{i}.attn_k.weight", interleaved(layer.self_attn.k_proj.weight))
        put(f"blk.{i}.attn_v.weight", layer.self_attn.v_proj.weight)
        put(f"blk.{i}.attn_output.weight", layer.self_attn.o_proj.weight)
        put(f"blk.{i}.ffn_gate.weight", layer.mlp.gate_proj.weight)
        put(f"blk.{i}.ffn_up.weight", layer.mlp.up_proj.weight)
        put(f"blk.{i}.ffn_down.weight", layer.mlp.down_proj.weight)
        put(f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight)
        put(f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "sorting"}, "Unknown task 'sorting'; known: text-classification"),
        ({"task": "text-classification"}, "needs at least two classes: give labels, or num_labels"),
        ({"task": "text-classification", "num_labels": 3, "labels": ["a", "b"]}, "now 2 labels and num_labels=3"),
        ({"task": "features", "num_labels": 2}, "belong to classification, not to task 'features'"),
        ({"task": "image-classification", "num_labels": 2}, "has no image-classification model"),
    ],
)
def test_what_does_not_fit(folder, arguments, message):
    with pytest.raises(ModelError, match=message):
        inlay.models.open(folder, **arguments)


def test_unknown_names(tmp_path):
    with pytest.raises(ModelError, match=r"No model 'minilmm'.*\(minilm, gte-small.*Did you mean minilm") as caught:
        inlay.models.open("minilmm", "features")
    assert "As a Hugging Face name it cannot be opened" in str(caught.value)
    with pytest.raises(ModelError, match=r"No model 'nothing'"):
        inlay.models.fetch("nothing")
    with pytest.raises(ModelError, match=r"No file .*absent\.gguf"):
        inlay.models.open(tmp_path / "absent.gguf")
    with pytest.raises(ModelError, match=r"is no model folder: it has no config\.json"):
        inlay.models.open(tmp_path)


def test_weights_that_contradict_the_configuration(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(ModelError, match="the shapes in the file differ from those of its configuration"):
        inlay.models.open(tmp_path, "text-classification", num_labels=2)


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    from inlay.models import catalogue

    monkeypatch.setenv("INLAY_CACHE", str(tmp_path))

    def broken(folder):
        (folder / "config.json").write_text("{}")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        catalogue._converted("x", {"archive": "1"}, broken)
    assert [p.name for p in (tmp_path / "models").iterdir()] == [".x.lock"]
    made = catalogue._converted("x", {"archive": "1"}, lambda folder: (folder / "a").write_text("1"))
    again = catalogue._converted("x", {"archive": "1"}, lambda folder: (folder / "a").write_text("2"))
    assert (again / "a").read_text() == "1"
    assert made == again
    anew = catalogue._converted("x", {"archive": "2"}, lambda folder: (folder / "a").write_text("3"))
    assert (anew / "a").read_text() == "3"
