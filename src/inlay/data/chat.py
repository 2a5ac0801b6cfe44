"""Chats as token sequences in which only the assistant's answers carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inlay.data.rows import DataError

# for tokenizers without a chat template: headings, and the end-of-text token after every answer
PLAIN_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- message.content + '\\n\\n' -}}
{%- elif message.role == 'user' -%}
{{- '### Question\\n' + message.content + '\\n\\n' -}}
{%- else -%}
{{- '### Answer\\n' + message.content + eos_token + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Answer\\n' -}}{%- endif -%}
"""
IGNORED = -100  # the label that PyTorch's cross-entropy leaves out


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels (`IGNORED` outside answers) of the rows kept, which they are, and how many were hit."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    kept: list[int]
    dropped: int
    cut: int


def template_of(tokenizer: Any, template: str | None) -> str:
    """The given template, else the tokenizer's own, else the plain one."""
    return template or tokenizer.chat_template or PLAIN_TEMPLATE


def render(tokenizer: Any, messages: list[dict[str, str]], template: str, prompt: bool = False) -> str:
    """The chat as text; with `prompt`, up to where the assistant's answer begins."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(
            f"The chat template refuses a chat with the turns {roles}: {error}. Give another template."
        ) from error


def answer_spans(tokenizer: Any, messages: list[dict[str, str]], template: str) -> tuple[str, list[tuple[int, int]]]:
    """The whole chat as text, and where in it the assistant's answers lie, with their end-of-turn token.

    An answer is what the template adds when the assistant's turn is added after the prompt for it; white space after
    the end of the turn belongs to no answer.
    """
    whole = render(tokenizer, messages, template)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], template, prompt=True)
        after = whole if i + 1 == len(messages) else render(tokenizer, messages[: i + 1], template)
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                "The chat template writes earlier turns differently once a later one is there, so the answers cannot "
                "be told from the prompts. Give another template, or chats of a single answer."
            )
        spans.append((len(before), len(after.rstrip())))
    return whole, spans


def encode(tokenizer: Any, chats: Sequence[list[dict[str, str]]], template: str, max_length: int) -> Encoded:
    """Tokenise chats, keeping the first `max_length` tokens; rows that thereby lose every answer token are dropped."""
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} cannot tell which token comes from where; a fast one is needed.")
    rendered = [answer_spans(tokenizer, chat, template) for chat in chats]
    tokens = tokenizer(
        [text for text, _ in rendered],
        add_special_tokens=False,  # the template writes them
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    kept_ids, kept_labels, kept, dropped, cut = [], [], [], 0, 0
    each = zip(tokens["input_ids"], tokens["offset_mapping"], rendered, strict=True)
    for i, (ids, offsets, (_, spans)) in enumerate(each):
        labels = [
            token if any(first <= start < last for first, last in spans) else IGNORED
            for token, (start, _) in zip(ids, offsets, strict=True)
        ]
        whole = sum(label != IGNORED for label in labels)
        left = sum(label != IGNORED for label in labels[:max_length])
        if left == 0:
            dropped += 1
            continue
        cut += left < whole
        kept.append(i)
        kept_ids.append(ids[:max_length])
        kept_labels.append(labels[:max_length])
    return Encoded(kept_ids, kept_labels, kept, dropped, cut)
