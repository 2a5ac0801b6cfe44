"""Small random dual encoders of three families and the prompts that they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORDS = [
    "[PAD]", "[BOS]", "a", "photo", "of", "cat", "dog", "tabby", ".", "[UNK]", "blue", "truck", "seven", "oak",
    "trucks", "red", "deer", "[EOS]",
]  # fmt: skip
CLASSES = ["cat", "tabby_cat", "dog", "red deer", "truck"]
PROMPT = "a photo of a {}."
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = ("clip", "siglip", "bert")
TEXT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": len(WORDS), "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": WORDS.index("[EOS]"),
    "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4, "initializer_range": 0.3,
}  # fmt: skip


def dual_model(family: str, width: int = 10) -> nn.Module:
    """A CLIP, a SigLIP, or a ViT with a BERT; always the same numbers."""
    import transformers as t

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: nn.Module
        if family == "clip":
            model = t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=width))
        elif family == "siglip":
            sizes = {"text_config": TEXT | {"projection_size": 12}, "vision_config": VISION}
            model = t.SiglipModel(t.SiglipConfig(**sizes))
        else:
            vision, text = t.ViTModel(t.ViTConfig(**VISION)), t.BertModel(t.BertConfig(**TEXT, **STILL))
            model = t.VisionTextDualEncoderModel(vision_model=vision, text_model=text)
        for p in model.parameters():  # transformers draws some of these families' tensors small
            p.data += 0.2 * torch.randn_like(p) * (p.dim() > 0)
    return model.eval()


def words_tokenizer(family: str) -> Any:
    """A word is a token; SigLIP's has no special token in front and gives no mask."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    masked = family != "siglip"
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]" if masked else "$A [EOS]",
        special_tokens=[("[BOS]", 1), ("[EOS]", TEXT["eos_token_id"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]" if masked else "[EOS]", bos_token="[BOS]", eos_token="[EOS]",
        unk_token="[UNK]", model_max_length=TEXT["max_position_embeddings"],
        model_input_names=["input_ids", "attention_mask"] if masked else ["input_ids"],
    )  # fmt: skip


def save(family: str, folder: Path) -> Path:
    """Model and processor as files."""
    import transformers as t

    square = {"height": VISION["image_size"], "width": VISION["image_size"]}
    edge = {"size": {"shortest_edge": VISION["image_size"]}, "crop_size": square}
    looks = t.SiglipImageProcessorPil(size=square) if family == "siglip" else t.CLIPImageProcessorPil(**edge)
    kind = {"clip": t.CLIPProcessor, "siglip": t.SiglipProcessor, "bert": t.VisionTextDualEncoderProcessor}[family]
    dual_model(family).save_pretrained(folder)
    kind(looks, words_tokenizer(family)).save_pretrained(folder)
    return folder


def pixels(count: int = 3) -> Tensor:
    """Always the same images."""
    return torch.randn(count, 3, VISION["image_size"], VISION["image_size"], generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module, prompts: dict[str, Tensor], images: Tensor) -> Tensor:
    """Images × classes."""
    with torch.no_grad():
        return model(pixel_values=images, **prompts).logits_per_image
