"""Batches: tokens, labels and loss positions, with a small tokenizer made here."""

import io

import pytest
import torch
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import BitImageProcessorPil, PreTrainedTokenizerFast, ViTImageProcessorPil

import inlay.data
from inlay.data import Data, DataError
from inlay.data.chat import PLAIN_TEMPLATE, answer_spans, render
from inlay.data.rows import ImageRows, TextRows

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPT = "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens, four special ones before them."""
    specials = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(specials + letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=1000,
        chat_template=CHATML,
    )


def data_of(task, rows, labels=None) -> Data:
    content = rows if isinstance(rows, ImageRows) else TextRows(rows)
    return Data("made", task, {"train": content}, labels, "", "", "")


def chat(*turns):
    return {"messages": [{"role": r, "content": c} for r, c in turns]}


def loss_text(prepared, i=0):
    item = prepared.splits["train"][i]
    kept = item["labels"] != -100
    assert torch.equal(item["labels"][kept], item["input_ids"][kept])
    return prepared.processor.decode(item["labels"][kept])


def test_loss_on_the_answer_and_its_end_only(tokenizer):
    row = chat(("system", "be kind"), ("user", "hi"), ("assistant", "hello you"))
    prepared = inlay.data.prepare(data_of("causal-lm", [row]), tokenizer)
    assert loss_text(prepared) == "hello you<|im_end|>"
    whole = prepared.processor.decode(prepared.splits["train"][0]["input_ids"])
    assert whole == render(tokenizer, row["messages"], CHATML)
    prompt = render(tokenizer, row["messages"][:-1], prepared.template, prompt=True)
    assert whole.startswith(prompt)


def test_loss_on_every_answer(tokenizer):
    row = chat(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    prepared = inlay.data.prepare(data_of("causal-lm", [row]), tokenizer)
    assert loss_text(prepared) == "one<|im_end|>two<|im_end|>"


def test_answers_equal_to_their_questions_are_told_apart(tokenizer):
    row = chat(("user", "same"), ("assistant", "same"))
    prepared = inlay.data.prepare(data_of("causal-lm", [row]), tokenizer)
    whole, ((start, end),) = answer_spans(tokenizer, row["messages"], CHATML)
    assert whole[start:end] == "same<|im_end|>"
    assert start > whole.index("same")
    assert loss_text(prepared) == "same<|im_end|>"


def test_plain_template_where_there_is_none(tokenizer):
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>"
    )
    row = chat(("system", "rules"), ("user", "hi"), ("assistant", "yo"))
    prepared = inlay.data.prepare(data_of("causal-lm", [row]), bare)
    assert prepared.template == PLAIN_TEMPLATE
    text = prepared.processor.decode(prepared.splits["train"][0]["input_ids"])
    assert text == "<s>rules\n\n### Question\nhi\n\n### Answer\nyo<|im_end|>\n\n"
    assert loss_text(prepared) == "yo<|im_end|>"


def test_own_template(tokenizer):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + PROMPT
    row = chat(("user", "hi"), ("assistant", "yo"))
    prepared = inlay.data.prepare(data_of("causal-lm", [row]), tokenizer, template=template)
    assert prepared.template == template
    assert loss_text(prepared) == "yo"


def test_templates_that_cannot_be_followed(tokenizer):
    rewriting = "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else '...' }}{% endfor %}" + PROMPT
    row = chat(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    with pytest.raises(DataError, match="writes earlier turns differently"):
        inlay.data.prepare(data_of("causal-lm", [row]), tokenizer, template=rewriting)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    row = chat(("system", "x"), ("user", "a"), ("assistant", "one"))
    with pytest.raises(DataError, match="refuses a chat with the turns system, user, assistant: no system turn"):
        inlay.data.prepare(data_of("causal-lm", [row]), tokenizer, template=refusing)


def test_long_rows_never_lose_their_answer_silently(tokenizer):
    rows = [chat(("user", "q"), ("assistant", "abcdefgh")), chat(("user", "q" * 90), ("assistant", "lost"))]
    start = len(tokenizer(render(tokenizer, rows[0]["messages"][:1], CHATML, prompt=True))["input_ids"])
    prepared = inlay.data.prepare(data_of("causal-lm", rows), tokenizer, max_length=start + 3)
    assert len(prepared.splits["train"]) == 1
    assert loss_text(prepared) == "abc"
    assert prepared.note == (
        f"train: 1 of 2 rows dropped, whose answers begin after {start + 3} tokens; "
        f"1 answers cut short at {start + 3} tokens."
    )
    with pytest.raises(DataError, match="No row keeps a token of its answer within 4 tokens"):
        inlay.data.prepare(data_of("causal-lm", rows), tokenizer, max_length=4)


def test_documents_are_cut_into_rows_that_all_carry_loss(tokenizer):
    texts = ["abcdefghij", "klm", ""]
    prepared = inlay.data.prepare(data_of("causal-lm", [{"text": t} for t in texts]), tokenizer, max_length=4)
    rows = [tokenizer.decode(row["input_ids"]) for row in prepared.splits["train"]]
    assert rows == ["abcd", "efgh", "ij<|im_end|>", "klm<|im_end|>"]
    assert all(torch.equal(row["labels"], row["input_ids"]) for row in prepared.splits["train"])
    assert prepared.template is None
    with pytest.raises(DataError, match="its rows are documents, not chats"):
        inlay.data.prepare(data_of("causal-lm", [{"text": "ab"}]), tokenizer, template=CHATML)
    with pytest.raises(DataError, match="No document has two tokens"):
        inlay.data.prepare(data_of("causal-lm", [{"text": ""}]), tokenizer)


def test_collate_pads_and_masks(tokenizer):
    rows = [{"text": "abc", "label": 1}, {"text": "abcde", "label": 0}]
    prepared = inlay.data.prepare(data_of("text-classification", rows, ["x", "y"]), tokenizer, multiple_of=8)
    (batch,) = DataLoader(prepared.splits["train"], batch_size=2, collate_fn=prepared.collate)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert (batch["input_ids"][0, 3:] == tokenizer.pad_token_id).all()
    assert batch["labels"].tolist() == [1, 0]
    assert prepared.splits["train"].lengths == [3, 5]
    rows = [chat(("user", "a"), ("assistant", "b" * n)) for n in (1, 4)]
    chats = inlay.data.prepare(data_of("causal-lm", rows), tokenizer)
    batch = chats.collate([chats.splits["train"][i] for i in range(2)])
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["labels"].shape == batch["input_ids"].shape


def test_pairs_and_scores(tokenizer):
    rows = [{"text": "ab", "text2": "cd", "label": 2.5}, {"text": "x" * 30, "text2": "y", "label": 0.0}]
    prepared = inlay.data.prepare(data_of("regression", rows), tokenizer, max_length=10)
    first = prepared.splits["train"][0]
    assert tokenizer.decode(first["input_ids"]) == "abcd"
    assert first["labels"].dtype == torch.float32
    assert tokenizer.decode(prepared.splits["train"][1]["input_ids"]) == "x" * 9 + "y", "the longer text is cut"
    assert prepared.note == "train: 1 of 2 rows reach 10 tokens and may be cut."


def test_lengths_and_options_that_do_not_fit(tokenizer):
    text = data_of("text-classification", [{"text": "a", "label": 0}], ["x", "y"])
    with pytest.raises(DataError, match="max_length=2000 is outside 1 to 1000"):
        inlay.data.prepare(text, tokenizer, max_length=2000)
    with pytest.raises(DataError, match="image_size has no meaning for text-classification"):
        inlay.data.prepare(text, tokenizer, image_size=32)
    with pytest.raises(DataError, match="template has no meaning for text-classification"):
        inlay.data.prepare(text, tokenizer, template="x")


@pytest.fixture
def pictures():
    colours = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 10, 10, 3) * 40
    return data_of("image-classification", ImageRows(colours.numpy(), [0, 1] * 3), ["even", "odd"])


@pytest.mark.parametrize("kind", [BitImageProcessorPil, ViTImageProcessorPil])
def test_images(pictures, kind):
    processor = kind(image_mean=[0.0] * 3, image_std=[1.0] * 3, do_normalize=True)
    assert inlay.data.prepare(pictures, processor).splits["train"][0]["pixel_values"].shape == (3, 224, 224)
    prepared = inlay.data.prepare(pictures, processor, image_size=28)
    batch = prepared.collate([prepared.splits["train"][i] for i in range(6)])
    assert batch["pixel_values"].shape == (6, 3, 28, 28)
    assert torch.allclose(batch["pixel_values"][:, 0, 14, 14] * 255, torch.arange(6) * 40.0, atol=1.0)
    assert batch["labels"].tolist() == [0, 1] * 3
    assert prepared.splits["train"][2]["pixel_values"] is prepared.splits["train"][2]["pixel_values"], "made once"


def test_images_beyond_the_budget_are_made_anew(pictures):
    from inlay.data.batches import ImageTensors

    rows = ImageTensors(pictures.splits["train"], ViTImageProcessorPil(), {}, budget=224 * 224 * 3 * 4)
    assert rows[0]["pixel_values"] is rows[0]["pixel_values"]
    assert rows[1]["pixel_values"] is not rows[1]["pixel_values"]
    assert torch.equal(rows[1]["pixel_values"], rows[1]["pixel_values"])


def test_grey_and_turned_pictures_come_out_upright_rgb(tmp_path):
    picture = Image.new("L", (6, 3), 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    picture.save(tmp_path / "a.jpg", exif=exif)
    row = ImageRows([tmp_path / "a.jpg"], [0])[0]
    assert (row["image"].mode, row["image"].size) == ("RGB", (3, 6))


def shown(samples) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(inlay.data.render_preview(samples))
    return console.file.getvalue()


def test_preview(tokenizer, pictures):
    rows = data_of("causal-lm", [chat(("user", "hi"), ("assistant", "yo"))])
    (sample,) = inlay.data.preview(rows, inlay.data.prepare(rows, tokenizer))
    assert [t for t, loss in zip(sample["tokens"], sample["loss"], strict=True) if loss] == ["y", "o", "<|im_end|>"]
    assert sample["text"].startswith("<|im_start|>user")
    assert sample["label"] is None
    assert "«y│o│<|im_end|>»" in shown([sample])

    rows = data_of("text-classification", [{"text": "abc", "label": 1}], ["x", "why"])
    (sample,) = inlay.data.preview(rows, inlay.data.prepare(rows, tokenizer))
    assert sample == {"tokens": ["a", "b", "c"], "loss": [False] * 3, "text": "abc", "label": "why"}

    samples = inlay.data.preview(pictures, inlay.data.prepare(pictures, ViTImageProcessorPil()), n=2)
    assert [s["label"] for s in samples] == ["even", "odd"]
    assert samples[0]["shape"] == [3, 224, 224]
    assert samples[0]["mean"] == pytest.approx(-1.0)
    assert "3 x 224 x 224 pixels, mean -1.000" in shown(samples)
