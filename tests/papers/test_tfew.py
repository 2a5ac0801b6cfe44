"""T-Few's losses against sums written here, and its learning in a plain loop, in Trainer and in `inlay train`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import inlay
from inlay.core.errors import AdapterError, OptionError, SiteError
from inlay.data import DataError
from inlay.methods import IA3, TFew
from inlay.recipe import Recipe
from inlay.train import train
from laws import nets

WRONG = -100


def batch() -> dict[str, torch.Tensor]:
    """Two questions, of three and of two answers with one to three tokens, the right ones first; padded to seven."""
    rows = [([5, 6, 7], [8]), ([5, 6, 7], [9, 10]), ([5, 6, 7], [8, 11, 12]), ([13, 14], [15, 16]), ([13, 14], [17])]
    ids, labels, choices = (torch.zeros(5, 7, dtype=torch.long) for _ in range(3))
    labels.fill_(WRONG)
    for k, (prompt, answer) in enumerate(rows):
        n, m = len(prompt), len(answer)
        ids[k, : n + m] = torch.tensor(prompt + answer)
        choices[k, n : n + m] = 1 if k < 3 else 2
        if k in (0, 3):
            labels[k, n : n + m] = torch.tensor(answer)
    return {"input_ids": ids, "labels": labels, "choices": choices, "attention_mask": (ids != 0).long()}


def by_hand(logits: torch.Tensor, given: dict[str, torch.Tensor], method: TFew) -> tuple[float, float, float]:
    """L_LM, L_UL and L_LN, token by token."""
    p = logits.double().softmax(-1)
    own: dict[int, list[tuple[bool, list[float]]]] = {1: [], 2: []}
    for k in range(5):
        at = [t for t in range(7) if given["choices"][k, t]]
        question = int(given["choices"][k, at[0]])
        own[question].append((k in (0, 3), [float(p[k, t - 1, given["input_ids"][k, t]]) for t in at]))
    right = [q for answers in own.values() for good, tokens in answers if good for q in tokens]
    wrong = [q for answers in own.values() for good, tokens in answers if not good for q in tokens]
    choice = []
    for answers in own.values():
        scores = [sum(map(math.log, tokens)) / len(tokens) ** method.exponent for _, tokens in answers]
        choice.append(math.log(sum(map(math.exp, scores))) - scores[[good for good, _ in answers].index(True)])
    return (
        -sum(map(math.log, right)) / len(right),
        -sum(math.log(1 - q + method.epsilon) for q in wrong) / len(wrong),
        sum(choice) / len(choice),
    )


@pytest.mark.parametrize(
    "method", [TFew(), TFew(unlikelihood=0.5, normalised=2.0, exponent=0.5, epsilon=0.0)], ids=["paper", "weighted"]
)
@pytest.mark.parametrize("net", [nets.gpt2, nets.llama], ids=["gpt2", "llama"])
def test_losses(net, method):
    model, given = net().eval(), batch()
    plain = model(**{k: t for k, t in given.items() if k != "choices"})
    inlay.adapt(model, [IA3(), method])
    out = model(**given)
    lm, ul, ln = by_hand(plain.logits.detach(), given, method)
    assert plain.loss.item() == pytest.approx(lm, rel=1e-5)  # what the model computes is the loss on right answers
    assert out.loss.item() == pytest.approx(lm + method.unlikelihood * ul + method.normalised * ln, rel=1e-5)
    assert torch.equal(out.logits, plain.logits)
    tuple_out = model(**given, return_dict=False)
    assert torch.equal(tuple_out[0], out.loss)
    with torch.no_grad():  # evaluation is on the model's own loss
        assert model(**given).loss.item() == pytest.approx(lm, rel=1e-5)
    whole = model(**given, num_items_in_batch=torch.tensor(6))  # Trainer, two batches to a step: 3 of 6 right tokens
    assert whole.loss.item() == pytest.approx(out.loss.item() / 2, rel=1e-5)
    with inlay.disabled(model):
        assert model(**given).loss.item() == pytest.approx(lm, rel=1e-5)
    with pytest.raises(AdapterError, match="T-Few compares answers: give batches with input_ids, labels and choices"):
        model(**{k: t for k, t in given.items() if k != "choices"})


def test_other_layouts_are_refused():
    model, given = nets.llama().eval(), batch()
    inlay.adapt(model, [IA3(), TFew()])
    with pytest.raises(AdapterError, match=r"choices \(5, 6\) and logits \(5, 7, 32\) must be of one place"):
        model(**given | {"choices": given["choices"][:, 1:]})


def test_gradients_are_those_of_the_sum():
    model, given = nets.llama().eval(), batch()
    piece = inlay.adapt(model, [IA3(), TFew()])
    model(**given).loss.backward()
    found = [p.grad.clone() for p in piece.parameters()]
    for p in piece.parameters():
        p.grad = None
    out = model(**{k: t for k, t in given.items() if k not in ("choices", "labels")})
    logp = out.logits[:, :-1].log_softmax(-1).gather(2, given["input_ids"][:, 1:, None])[..., 0]
    answer = given["choices"][:, 1:] > 0
    right = torch.tensor([True, False, False, True, False])
    score = (logp * answer).sum(1) / answer.sum(1)
    loss = -logp[answer & right[:, None]].mean()
    loss = loss - (1 - logp[answer & ~right[:, None]].exp() + 0.01).log().mean()
    loss = loss - (score[:3].log_softmax(0)[0] + score[3:].log_softmax(0)[0]) / 2
    loss.backward()
    for p, grad in zip(piece.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)


def test_without_a_method_beside_it_there_is_nothing_to_train():
    with pytest.raises(SiteError, match=r"there is none: \[IA3\(\), TFew\(\)\]"):
        inlay.adapt(nets.llama(), TFew())


# ------------------------------------------------------------------------------------------------ data
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "sky": "blue", "sun": "yellow"}


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Questions with three answers to choose from."""
    names, rows = list(COLOURS.values()), []
    for i in range(48):
        thing, colour = list(COLOURS.items())[i % 6]
        others = [names[(i + k) % 6] for k in (1, 2) if names[(i + k) % 6] != colour]
        rows.append({"prompt": f"{i}: what colour is {thing}?", "answer": colour, "choices": [*others, colour]})
    path = tmp_path_factory.mktemp("choices") / "colours.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_choices_of_a_file(questions):
    data = inlay.data.load(str(questions))
    assert data.task == "causal-lm"
    row = data.splits["train"][0]
    colour = COLOURS[row["messages"][0]["content"].split()[-1][:-1]]
    assert row["messages"][1] == {"role": "assistant", "content": colour}
    assert len(row["wrong"]) == 2
    assert colour not in row["wrong"]


@pytest.mark.parametrize(
    ("choices", "reason"),
    [("red", "must be a list of texts"), ([], "no other answer"), (["red"], "no other answer"), ([1], "list of texts")],
)
def test_choices_that_are_none(tmp_path, choices, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "Which?", "answer": "red", "choices": choices}))
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 1: .*{reason}"):
        inlay.data.load(str(path), complete=False)


def test_classes_as_answers(tmp_path):
    path = tmp_path / "kinds.csv"
    path.write_text("text,label\n" + "".join(f"word {i},{'abc'[i % 3]}\n" for i in range(30)))
    data = inlay.data.load(str(path), task="causal-lm")
    assert data.labels is None
    for row in data.splits["train"]:
        assert sorted([row["messages"][1]["content"], *row["wrong"]]) == ["a", "b", "c"]


# ------------------------------------------------------------------------------------------------ learning
@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> str:
    """A Llama of two layers with random weights whose tokens are the questions' words, as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    words = ["<pad>", "<s>", "</s>", "<unk>", "what", "colour", "is", "?", ":", "###", "Question", "Answer",
             *COLOURS, *COLOURS.values()]  # fmt: skip
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def recipe(model: str, data: Path, folder: Path) -> Recipe:
    lora = {"method": "lora(r=8)", "where": ["attn.q", "attn.v", "mlp.up", "mlp.down"]}
    return Recipe(
        model=model, data=str(data), method=[lora, "tfew"], output=str(folder), steps=60, batch=8, accumulate=2,
        learning_rate=1e-2, metric="choice_accuracy", evaluate_every=60, checkpoint_every=None,
    )  # fmt: skip


def test_it_learns_in_inlay_train(questions, tiny_llama, tmp_path):
    found = train(recipe(tiny_llama, questions, tmp_path / "tfew"))
    assert found.metrics["choice_accuracy"] > 0.9  # of three
    assert found.curve[-1]["loss"] < 0.5 * found.curve[0]["loss"]
    again = inlay.models.open(tiny_llama, "causal-lm").model
    assert inlay.load(again, str(tmp_path / "tfew")).adapter_parameters > 0  # the companion is no part of the file


def test_choice_accuracy_needs_choices(tiny_llama, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"Say {i}", "answer": str(i)}) for i in range(40)))
    with pytest.raises(OptionError, match="choice_accuracy is for rows with answers to choose from"):
        train(recipe(tiny_llama, path, tmp_path / "out"))


def test_it_learns_in_trainer(questions, tiny_llama, tmp_path):
    from transformers import Trainer, TrainingArguments

    opened = inlay.models.open(tiny_llama, "causal-lm")
    prepared = inlay.data.prepare(inlay.data.load(str(questions)), opened.processor)
    piece = inlay.adapt(opened.model, [IA3(), TFew()])
    args = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=2e-2,
        report_to=[], save_strategy="no", logging_steps=1, remove_unused_columns=False, use_cpu=True, warmup_steps=1,
    )  # fmt: skip
    trainer = Trainer(opened.model, args, data_collator=prepared.collate, train_dataset=prepared.splits["train"])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert any(level.method.l.ne(1).any() for level in piece.levels if isinstance(level.method, IA3))
