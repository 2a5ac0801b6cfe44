"""Open a pretrained model for a task, with a fresh head where the task needs one."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.core.dual import is_dual
from inlay.models.catalogue import ModelError, fetch, find, from_gguf, unknown
from inlay.models.fewbits import open_few_bits, stored_in_few_bits
from inlay.models.quiet import quiet

BY_WORDS = "zero-shot-image-classification"
"""What transformers calls the task of comparing an image with the text of every class."""
TASKS = ("text-classification", "regression", "causal-lm", "image-classification", BY_WORDS, "features")
_log = logging.getLogger("inlay")


@dataclass(frozen=True)
class Opened:
    """A model ready to adapt.

    Attributes:
        model: the transformers model, in evaluation mode, on the CPU.
        processor: its tokenizer, or its image processor.
        name: what was asked for.
        source: the folder or hub name it was read from.
        note: what to know about these weights; empty if there is nothing.
        head: paths of the modules (or single parameters) that were freshly initialised because the checkpoint does
            not have them: the task's head and, for some encoders, the pooler.
    """

    model: nn.Module
    processor: Any
    name: str
    source: str
    note: str
    head: list[str]


def open(
    name_or_path: str | Path,
    task: str | None = None,
    num_labels: int | None = None,
    labels: list[str] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    quantize: str | None = None,
    quantize_group: int | None = None,
    prompt: str | None = None,
) -> Opened:
    """Open a model by embedded name, local folder, GGUF file or Hugging Face name.

    Args:
        name_or_path: see above; embedded names are fetched on first use, GGUF files converted once.
        task: one of `TASKS`; None opens the class that the checkpoint names, head included.
        num_labels: classes of the head (classification only); taken from `labels` where given.
        labels: class names, stored in the model's configuration.
        dtype: of the parameters, e.g. "float32" or "bfloat16".
        seed: of the fresh head's initialisation; the global random state is left as it was.
        quantize, quantize_group: store linear layers in few bits, as `inlay.models.quantise.quantise` does; None for
            none.
        prompt: for image classification, the text in which the classes' names are to be read: the model is then a dual
            encoder (CLIP, SigLIP, VisionTextDualEncoder) without a head, and the processor one of images and text.

    Raises:
        ModelError: unknown name, task or dtype; labels that do not fit; a checkpoint that does not fit the task.
    """
    if task is not None and task not in TASKS:
        raise ModelError(f"Unknown task {task!r}; known: {', '.join(TASKS)}.")
    if prompt is not None:
        if task not in ("image-classification", BY_WORDS):
            raise ModelError(f"prompt is for classifying images by the text of their classes, not for {task}.")
        task, num_labels, labels = BY_WORDS, None, None
    settings = _label_settings(task, num_labels, labels)
    source, note = _resolve(str(name_or_path))
    with quiet():
        try:
            config = _config(source)
            auto = _auto_class(task, config)
            if task is not None and type(config) not in auto._model_mapping:
                raise ModelError(f"{name_or_path} ({config.model_type}) has no {task} model in transformers.")
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # of the CPU only: heads are initialised there
                if stored_in_few_bits(source):
                    model, report = open_few_bits(auto, source, _dtype(dtype), settings)
                else:
                    model, report = auto.from_pretrained(
                        source, dtype=_dtype(dtype), output_loading_info=True, ignore_mismatched_sizes=True, **settings
                    )
            if task == BY_WORDS and not is_dual(model):
                raise ModelError(
                    f"{name_or_path} ({config.model_type}) does not compare images with texts: leave prompt out, or "
                    "open an image-text model (CLIP, SigLIP, VisionTextDualEncoder)."
                )
            processor = _both(source) if task == BY_WORDS else _processor(source, model)
        except ModelError:
            raise
        except (OSError, ValueError) as error:
            if Path(source).exists():
                why = first_line(error)
                raise ModelError(f"{source} cannot be opened for {task or 'its own task'}: {why}") from error
            raise ModelError(
                f"{unknown(source)} As a Hugging Face name it cannot be opened: {first_line(error)}"
            ) from error
    resized = {key for key, *_ in report["mismatched_keys"]}
    inside = sorted(key for key in resized if key.startswith(f"{model.base_model_prefix}."))
    if inside:
        raise ModelError(f"{source}: the shapes in the file differ from those of its configuration: {inside[0]}")
    head = _fresh_modules(model, {*report["missing_keys"], *resized})
    if quantize is not None:
        from inlay.models.quantise import quantise

        quantise(model, quantize, head, quantize_group)
    return Opened(model.eval(), processor, str(name_or_path), source, note, head)


def first_line(error: Exception) -> str:
    """What transformers says of an error, without the advice that follows."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _label_settings(task: str | None, num_labels: int | None, labels: list[str] | None) -> dict[str, Any]:
    """What the head needs to know, as settings of the model's configuration."""
    if task == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    if task not in ("text-classification", "image-classification"):
        if num_labels is not None or labels is not None:
            raise ModelError(f"num_labels and labels belong to classification, not to task {task!r}.")
        return {}
    count = len(labels) if labels is not None else num_labels
    if count is None or count < 2 or (num_labels is not None and num_labels != count):
        raise ModelError(
            f"{task} needs at least two classes: give labels, or num_labels"
            + (f" (now {len(labels)} labels and num_labels={num_labels})." if labels is not None else ".")
        )
    named = labels or [f"LABEL_{i}" for i in range(count)]
    settings: dict[str, Any] = {"id2label": dict(enumerate(named)), "label2id": {n: i for i, n in enumerate(named)}}
    if task == "text-classification":
        settings["problem_type"] = "single_label_classification"
    return settings


def _resolve(name: str) -> tuple[str, str]:
    """Where to read from, and the note to hand on."""
    entry = find(name)
    if entry is not None:
        if entry.caution:
            _say_once(f"{name}: {entry.caution}")
        return str(fetch(name)), " ".join(text for text in (entry.caution, entry.note) if text)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"No file {path}.")
        return str(from_gguf(path)), f"Dequantised from {path.name}."
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{path} is no model folder: it has no config.json.")
        return str(path), ""
    return name, ""


@cache
def _say_once(text: str) -> None:
    _log.warning(text)


def _dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in known:
        raise ModelError(f"Unknown dtype {name!r}; known: {', '.join(known)}.")
    return known[name]


def _config(source: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source)


def _auto_class(task: str | None, config: Any) -> Any:
    import transformers

    automatic = {
        "text-classification": transformers.AutoModelForSequenceClassification,
        "regression": transformers.AutoModelForSequenceClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
        "image-classification": transformers.AutoModelForImageClassification,
        BY_WORDS: transformers.AutoModel,  # its own class for this leaves VisionTextDualEncoderModel out
        "features": transformers.AutoModel,
    }
    if task is not None:
        return automatic[task]
    return getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)


def _processor(source: str, model: Any) -> Any:
    """The tokenizer of a text model or the image processor (Pillow's, with or without torchvision) of another."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if model.main_input_name == "pixel_values":
        return AutoImageProcessor.from_pretrained(source, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # padding carries neither attention nor loss
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # decoder classifiers look for the last real token
    return tokenizer


def _both(source: str) -> Any:
    """The processor of images and text of a dual encoder."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(source)


def _fresh_modules(model: nn.Module, fresh: Iterable[str]) -> list[str]:
    """The outermost modules all of whose tensors are in `fresh`, then single tensors left over."""
    left = set(fresh)
    found: list[str] = []
    for path, module in model.named_modules():
        if not path or any(path.startswith(f"{f}.") for f in found):
            continue
        inside = {f"{path}.{name}" for name in module.state_dict()}
        if inside and inside <= left:
            found.append(path)
    covered = tuple(f"{f}." for f in found)
    return found + sorted(key for key in left if not key.startswith(covered))
