"""Architectures known by name, as data: `inlay plan --arch roberta-base` needs neither weights nor a network.

Each entry is (transformers model type, task, fields of its configuration that differ from that type's defaults).
"""

from __future__ import annotations

from typing import Any

from inlay.core.errors import OptionError, near
from inlay.models.opening import BY_WORDS

_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def _llama(
    hidden: int, layers: int, heads: int, inner: int, vocab: int = 32000, kv: int | None = None
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner,
        "vocab_size": vocab, "num_key_value_heads": kv or heads,
    }  # fmt: skip


ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base": ("bert", "text-classification", {}),
    "bert-large": ("bert", "text-classification", _LARGE),
    "roberta-base": ("roberta", "text-classification", _ROBERTA),
    "roberta-large": ("roberta", "text-classification", _ROBERTA | _LARGE),
    "gpt2-small": ("gpt2", "causal-lm", {}),
    "gpt2-medium": ("gpt2", "causal-lm", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", "causal-lm", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "llama-7b": ("llama", "causal-lm", _llama(4096, 32, 32, 11008)),
    "llama-13b": ("llama", "causal-lm", _llama(5120, 40, 40, 13824)),
    "llama2-70b": ("llama", "causal-lm", _llama(8192, 80, 64, 28672, kv=8)),
    "llama3-8b": ("llama", "causal-lm", _llama(4096, 32, 32, 14336, 128256, 8)),
    "mamba-130m": ("mamba", "causal-lm", {"num_hidden_layers": 24}),
    "vit-base": ("vit", "image-classification", {}),
    "vit-large": ("vit", "image-classification", _LARGE),
    "minilm": (
        "bert", "text-classification",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "gte-small": (
        "bert", "text-classification",
        {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "stories15m": (
        "llama", "causal-lm",
        _llama(288, 6, 6, 768) | {"max_position_embeddings": 256, "tie_word_embeddings": True},
    ),
    "smollm2-135m-instruct": (
        "llama", "causal-lm",
        _llama(576, 30, 9, 1536, 49152, 3) | {"max_position_embeddings": 8192, "tie_word_embeddings": True},
    ),
    "dinov2-small": (
        "dinov2_with_registers", "image-classification",
        {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14},
    ),
    "clip-vit-b16": (
        "clip", BY_WORDS,
        {"vision_config": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16,
                           "intermediate_size": 3072}, "projection_dim": 512},
    ),
    "mobilenetv2": ("mobilenet_v2", "image-classification", {"tf_padding": False}),
    "resnet50": ("resnet", "image-classification", {"downsample_in_bottleneck": True}),
}  # fmt: skip


ARCHITECTURES |= {
    f"lit-{vision}": (
        "vision-text-dual-encoder", BY_WORDS,
        {"vision_config": {"model_type": ARCHITECTURES[vision][0], **ARCHITECTURES[vision][2], **more},
         "text_config": {"model_type": "bert", **ARCHITECTURES["minilm"][2]}, "projection_dim": 256},
    ) for vision, more in (("mobilenetv2", {"hidden_size": 1280}), ("dinov2-small", {}))
}  # fmt: skip


IMAGE_SIZES = {"dinov2-small": 224, "lit-dinov2-small": 70, "lit-mobilenetv2": 112}
"""Side of the images that a model is given, where its configuration states the largest one."""


def configuration(arch: str, labels: int = 2) -> tuple[Any, str, int]:
    """(transformers configuration, task, side of its images in pixels) of an architecture by name, or of a model.

    Raises:
        OptionError: an unknown name.
    """
    from transformers import AutoConfig

    if arch in ARCHITECTURES:
        kind, task, fields = ARCHITECTURES[arch]
        classes = {} if task == "causal-lm" else {"num_labels": labels}
        config = AutoConfig.for_model(kind, **fields, **classes)
        return config, task, IMAGE_SIZES.get(arch, image_size(config))
    config = own_configuration(arch)
    heads = " ".join(config.architectures or [])
    task = "causal-lm" if "CausalLM" in heads or "LMHead" in heads else "text-classification"
    if config.model_type in ("clip", "siglip", "siglip2", "vision-text-dual-encoder"):
        task = BY_WORDS
    if config.model_type in ("vit", "dinov2", "dinov2_with_registers", "resnet", "mobilenet_v2"):
        task = "image-classification"
    if task != "causal-lm":
        config.num_labels = labels
    return config, task, image_size(config)


def own_configuration(arch: str) -> Any:
    """The configuration of a model folder, a GGUF file or a Hugging Face name."""
    from pathlib import Path

    from transformers import AutoConfig

    from inlay.models.catalogue import from_gguf

    path = Path(arch).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        path = from_gguf(path)
    if (path / "config.json").exists():
        return AutoConfig.from_pretrained(path)
    message = f"unknown architecture '{arch}'{near(arch, ARCHITECTURES)} (known: {', '.join(ARCHITECTURES)})"
    if path.exists() or "/" not in arch:
        raise OptionError(message)
    try:
        return AutoConfig.from_pretrained(arch)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise OptionError(f"{message}. As a Hugging Face name it cannot be opened: {why}") from error


def image_size(config: Any) -> int:
    """The side that a configuration states, 224 where it states none."""
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    return size if isinstance(size, int) else 224
