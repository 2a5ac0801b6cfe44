"""A few samples as the model will see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inlay.data.chat import IGNORED
from inlay.data.prepare import Prepared
from inlay.data.rows import Data

if TYPE_CHECKING:
    from rich.console import RenderableType


def preview(data: Data, prepared: Prepared, n: int = 3, split: str = "train") -> list[dict[str, Any]]:
    """The first `n` samples of a split, as plain data.

    Text: `tokens` (as text), `loss` (for every token whether it carries loss), `text` (decoded, special tokens
    included) and `label` (class name or score; None for causal-lm). Images: `shape`, `mean` and `std` of the pixel
    values, and `label`.
    """
    rows = prepared.splits[split]
    return [_sample(data, prepared, rows[i]) for i in range(min(n, len(rows)))]  # type: ignore[arg-type]


def _sample(data: Data, prepared: Prepared, item: dict[str, Any]) -> dict[str, Any]:
    labels = item["labels"]
    single = None if labels.dim() else round(labels.item(), 4)
    named = data.labels[int(single)] if data.labels is not None and single is not None else single
    if "pixel_values" in item:
        pixels = item["pixel_values"]
        return {
            "shape": list(pixels.shape),
            "mean": pixels.mean().item(),
            "std": pixels.std().item(),
            "label": named,
        }
    ids = item["input_ids"].tolist()
    return {
        "tokens": [_token(prepared.processor, token) for token in ids],
        "loss": (labels != IGNORED).tolist() if labels.dim() else [False] * len(ids),
        "text": prepared.processor.decode(ids),
        "label": named,
    }


def _token(tokenizer: Any, token: int) -> str:
    """A token as text, with the leading space that decoding a SentencePiece token by itself takes away."""
    text = tokenizer.decode([token])
    begins_word = tokenizer.convert_ids_to_tokens(token).startswith("▁")
    return f" {text}" if begins_word and not text.startswith(" ") else text


def render_preview(samples: list[dict[str, Any]]) -> RenderableType:
    """Samples for a terminal: tokens that carry loss stand in green between « and »."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    shown = [Panel(_rendered(s), title=f"sample {i}", title_align="left") for i, s in enumerate(samples, 1)]
    marked = any(any(sample.get("loss", [])) for sample in samples)
    legend = [Text.assemble(("«…»", "green"), " tokens that carry loss", style="dim")] if marked else []
    return Group(*shown, *legend)


def _rendered(sample: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    out = Text()
    if "shape" in sample:
        shape = " x ".join(map(str, sample["shape"]))
        out.append(f"{shape} pixels, mean {sample['mean']:.3f}, standard deviation {sample['std']:.3f}")
    else:
        inside = False
        for token, loss in zip(sample["tokens"], sample["loss"], strict=True):
            if loss != inside:
                out.append("«" if loss else "»", style="bold green")
                inside = loss
            elif out:
                out.append("│", style="dim")
            out.append(token, style="green" if loss else "")
        if inside:
            out.append("»", style="bold green")
    if sample["label"] is not None:
        out.append(f"\nlabel: {sample['label']}", style="bold")
    return out
