"""Tiny random models of many architectures, and a few things every test here needs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

TEXT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 16}
FALCON = {key: TEXT[key] for key in TEXT if key != "intermediate_size"}
SEQ2SEQ = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
BART = {**SEQ2SEQ, "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "bos_token_id": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
        "max_position_embeddings": 64, "forced_eos_token_id": None}  # fmt: skip
T5 = {**SEQ2SEQ, "vocab_size": 60, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "gpt2": ("gpt2", {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
                      "eos_token_id": 2, "pad_token_id": 0}),
    "qwen3": ("qwen3", WIDE),
    "mistral-sliding": ("mistral", {**GROUPED, "sliding_window": 6}),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", {**WIDE, "sliding_window": 6}),
    "gemma3": ("gemma3_text", {**WIDE, "sliding_window": 6}),
    "phi": ("phi", GROUPED),
    "gpt_neox": ("gpt_neox", TEXT),
    "falcon": ("falcon", FALCON),
    "falcon-alibi": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}),
    "bloom": ("bloom", {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}),
    "opt": ("opt", {**FALCON, "ffn_dim": 40, "word_embed_proj_dim": 32}),
    "mamba": ("mamba", {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
                        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", TEXT),
    "roberta": ("roberta", TEXT),
    "electra": ("electra", {**TEXT, "embedding_size": 20}),
    "distilbert": ("distilbert", {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40,
                                  "max_position_embeddings": 64, "pad_token_id": 0}),
    "mpnet": ("mpnet", TEXT),
    "deberta": ("deberta-v2", {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                               "position_biased_input": False}),
}  # fmt: skip
SEQ2SEQS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "bart": ("bart", BART),
    "mbart": ("mbart", BART),
}
VISION = ("vit", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
                  "image_size": 16, "patch_size": 8})  # fmt: skip
ABSOLUTE = {"gpt2"}
"""Decoders that count absolute positions from the left edge, padding included, unless they are told the positions."""


def lively(model: nn.Module) -> nn.Module:
    """The model in evaluation mode with larger random weights, so that wrong positions and masks show."""
    model.eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "mixer" not in name:
                p.normal_(std=0.3 if "embed" in name or "wte" in name or "shared" in name else p.shape[-1] ** -0.5)
    return model


def make(auto: type, case: tuple[str, dict[str, Any]], attention: str | None = None, **more: Any) -> nn.Module:
    kind, settings = case
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(kind, **{**settings, **more})
    if attention is not None:
        config._attn_implementation = attention
    return lively(auto.from_config(config))


def decoder(name: str, attention: str | None = None) -> nn.Module:
    return make(transformers.AutoModelForCausalLM, DECODERS[name], attention)


def classifier(name: str, attention: str | None = None) -> nn.Module:
    return make(transformers.AutoModelForSequenceClassification, ENCODERS[name], attention, num_labels=3)


def seq2seq(name: str, attention: str | None = None) -> nn.Module:
    return make(transformers.AutoModelForSeq2SeqLM, SEQ2SEQS[name], attention)


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """Rows of different lengths as one batch."""
    n = max(len(row) for row in rows)
    batch, mask = torch.zeros(len(rows), n, dtype=torch.long), torch.zeros(len(rows), n, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(n - len(row), n) if side == "left" else slice(0, len(row))
        batch[i, place], mask[i, place] = row, 1
    return {"input_ids": batch, "attention_mask": mask}


def randomised(adapter: Any, scale: float = 0.5, seed: int = 3) -> Any:
    """Every trained tensor of an adapter far from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return adapter


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape, (a.shape, b.shape)
    worst = float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1.0))
    assert worst < tolerance, worst


GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def generated(model: nn.Module, batch: dict[str, Tensor], **how: Any) -> tuple[Tensor, Tensor]:
    """(tokens (batch, length), the logits each new token was chosen by (batch, new, vocabulary))."""
    out = model.generate(**batch, **{**GREEDY, **how}, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits, 1)


def same_without_cache(model: nn.Module, rows: list[Tensor], tokens: Tensor, logits: Tensor) -> None:
    """Whether a causal model, given each finished text at once and unpadded, has the logits of a generation."""
    new = logits.shape[1]
    for i, row in enumerate(rows):
        text = torch.cat([row, tokens[i, -new:]])[None]
        close(logits[i], model(text).logits[0, -new - 1 : -1])


def learns_with_every_tensor(model: Any, adapter: Any, x: Tensor) -> None:
    """Five steps on a decoder lower the loss, and each gives every trained tensor a gradient."""
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x, labels=x).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
