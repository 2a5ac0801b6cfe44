"""Prepare a data set for a model: tokenise once, or set up the image processor, and say what was cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from inlay.core.contexts import Template
from inlay.data.batches import Collate, ImageTensors, Item, TokenRows
from inlay.data.chat import encode, template_of
from inlay.data.choices import ChoiceRows, chats_of
from inlay.data.documents import cut
from inlay.data.prompts import class_prompts
from inlay.data.rows import Data, DataError, Rows

_LONGEST = 512  # unless asked for more: longer rows cost memory and rarely teach more


@dataclass(frozen=True)
class Prepared:
    """What a training loop needs.

    Attributes:
        task: as in `Data`.
        splits: torch data sets of dicts of tensors. Text: `input_ids`, `token_type_ids` where the model has them, and
            `labels`, one class (int64), score (float32) or, for causal-lm, one token or -100 per position; with
            answers to choose from, those of all of them and `parts`, see `inlay.data.choices`. Images:
            `pixel_values` and `labels`.
        collate: makes a batch of items, padded and with `attention_mask`; usable as `collate_fn`.
        processor: the tokenizer or image processor used.
        template: the chat template (Jinja), for chats: needed again when generating.
        max_length: tokens kept per row; None for images.
        note: how many rows were cut or dropped; empty if none.
        prompt: what class prompts have in common, where images are classified by the text of their classes; batches
            then carry the classes' `input_ids` and `attention_mask`, one row per class.
    """

    task: str
    splits: Mapping[str, Dataset[Item]]
    collate: Collate
    processor: Any
    template: str | None
    max_length: int | None
    note: str
    prompt: Template | None = None


def prepare(
    data: Data,
    processor: Any,
    max_length: int | None = None,
    image_size: int | None = None,
    template: str | None = None,
    multiple_of: int = 1,
    prompt: str | None = None,
) -> Prepared:
    """Turn rows into tensors.

    Args:
        data: the data set.
        processor: a tokenizer, or for images an image processor (as `inlay.models.open` returns).
        max_length: tokens kept per row; by default what the tokenizer allows, at most 512.
        image_size: side in pixels of the images the model will see, instead of the processor's own.
        template: a chat template (Jinja) instead of the tokenizer's own; causal-lm only.
        multiple_of: pad sequences to a multiple of this, e.g. 8.
        prompt: a text with `{}` for the class, for image-text models, whose processor is one of both.

    Raises:
        DataError: an option that does not fit the task, a length the tokenizer does not allow, or a split of which
            nothing is left.
    """
    images = data.task == "image-classification"
    for name, value, fits in (
        ("image_size", image_size, images),
        ("max_length", max_length, not images),
        ("template", template, data.task == "causal-lm"),
        ("prompt", prompt, images),
    ):
        if value is not None and not fits:
            raise DataError(f"{name} has no meaning for {data.task}.")
    if images:
        looks = processor if prompt is None else processor.image_processor
        options = {} if image_size is None else size_options(looks, image_size)
        splits = {split: ImageTensors(rows, looks, options) for split, rows in data.splits.items()}
        if prompt is None:
            return Prepared(data.task, splits, Collate(), processor, None, None, "")
        shared = Template.read(prompt, processor.tokenizer)
        constant = class_prompts(data.labels or [], prompt, processor.tokenizer)
        return Prepared(data.task, splits, Collate(constant=constant), processor, None, None, "", shared)

    length = _length(processor, max_length)
    documents = data.task == "causal-lm" and "messages" not in next(iter(data.splits["train"]))
    if documents and template is not None:
        raise DataError(f"template has no meaning for {data.name}: its rows are documents, not chats.")
    used = template_of(processor, template) if data.task == "causal-lm" and not documents else None
    made: dict[str, Dataset[Item]] = {}
    notes = []
    for split, rows in data.splits.items():
        if documents:
            made[split], note = _documents(rows, processor, length)
        else:
            chats = _choices if "wrong" in rows[0] else _chats
            made[split], note = chats(rows, processor, used, length) if used else _texts(rows, processor, length)
        if note:
            notes.append(f"{split}: {note}.")
    pad_id = processor.pad_token_id if processor.pad_token_id is not None else 0
    return Prepared(data.task, made, Collate(pad_id, multiple_of), processor, used, length, " ".join(notes))


def _length(tokenizer: Any, asked: int | None) -> int:
    most = tokenizer.model_max_length
    length = min(most, _LONGEST) if asked is None else asked
    if not 1 <= length <= most:
        raise DataError(f"max_length={length} is outside 1 to {most}, what this tokenizer's model takes.")
    return length


def _texts(rows: Rows, tokenizer: Any, length: int) -> tuple[TokenRows, str]:
    """Single texts or pairs, with the tokenizer's special tokens; the longer text of a pair is cut first."""
    pairs = "text2" in rows[0]
    encoded = tokenizer(
        rows.column("text"),
        rows.column("text2") if pairs else None,
        truncation=True,
        max_length=length,
        return_attention_mask=False,
    )
    fields = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
    full = sum(len(ids) == length for ids in encoded["input_ids"])
    note = f"{full} of {len(rows)} rows reach {length} tokens and may be cut" if full else ""
    return TokenRows(fields, rows.column("label")), note


def _chats(rows: Rows, tokenizer: Any, template: str, length: int) -> tuple[TokenRows, str]:
    encoded = encode(tokenizer, rows.column("messages"), template, length)
    if not encoded.input_ids:
        raise DataError(f"No row keeps a token of its answer within {length} tokens; raise max_length.")
    parts = []
    if encoded.dropped:
        parts.append(f"{encoded.dropped} of {len(rows)} rows dropped, whose answers begin after {length} tokens")
    if encoded.cut:
        parts.append(f"{encoded.cut} answers cut short at {length} tokens")
    return TokenRows({"input_ids": encoded.input_ids, "labels": encoded.labels}, None), "; ".join(parts)


def _choices(rows: Rows, tokenizer: Any, template: str, length: int) -> tuple[ChoiceRows, str]:
    """Chats with each of their answers; a row of which one has no token left is dropped."""
    each = [chats_of(row) for row in rows]
    owner = [i for i, chats in enumerate(each) for _ in chats]
    encoded = encode(tokenizer, [chat for chats in each for chat in chats], template, length)
    examples: list[list[tuple[list[int], list[int]]]] = [[] for _ in each]
    for at, ids, labels in zip(encoded.kept, encoded.input_ids, encoded.labels, strict=True):
        examples[owner[at]].append((ids, labels))
    whole = [rows for rows, chats in zip(examples, each, strict=True) if len(rows) == len(chats)]
    if not whole:
        raise DataError(f"No row keeps a token of every answer within {length} tokens; raise max_length.")
    parts = []
    if len(whole) < len(each):
        parts.append(
            f"{len(each) - len(whole)} of {len(each)} rows dropped, an answer of which begins after {length} tokens"
        )
    if encoded.cut:
        parts.append(f"{encoded.cut} answers cut short at {length} tokens")
    return ChoiceRows(whole), "; ".join(parts)


def _documents(rows: Rows, tokenizer: Any, length: int) -> tuple[TokenRows, str]:
    ids = cut(tokenizer, rows.column("text"), length)
    if not ids:
        raise DataError("No document has two tokens, of which the second could be predicted.")
    return TokenRows({"input_ids": ids, "labels": ids}, None), ""


def image_side(processor: Any) -> int | tuple[int, int] | None:
    """The size of the images that an image processor makes: side, or (height, width); None if it does not say."""
    settings = processor.to_dict()
    size = (settings.get("crop_size") if settings.get("do_center_crop") else None) or settings.get("size") or {}
    if "height" in size and "width" in size:
        return size["height"], size["width"]
    return size.get("shortest_edge")


def size_options(processor: Any, side: int) -> dict[str, Any]:
    """The processor's options for square images of `side` pixels, cropping nothing but what is not square."""
    settings = processor.to_dict()
    size, square = settings.get("size") or {}, {"height": side, "width": side}
    if "shortest_edge" in size and settings.get("do_center_crop"):
        return {"size": {"shortest_edge": side}, "crop_size": square}
    if "height" in size and settings.get("do_center_crop"):
        return {"size": square, "crop_size": square}
    if "height" in size:
        return {"size": square}
    raise DataError(f"image_size cannot be set for {type(processor).__name__}, whose size is {dict(size)}.")
