"""llama2.c checkpoints (version 0) and their tokenizer to `LlamaForCausalLM` and a fast tokenizer.

File layout: https://github.com/karpathy/llama2.c (`export.py`, `tokenizer.py`).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch

from inlay.archives import read_one
from inlay.models.convert.folder import save_weights

_HEADER = struct.Struct("<7i")  # width, hidden width, layers, heads, key-value heads, vocabulary, context


def stories15m(archive: Path, folder: Path) -> None:
    """The packed file holds the checkpoint, then the tokenizer."""
    from transformers import LlamaConfig

    content = read_one(archive, r"dist/llama2\.data$")
    width, hidden, layers, heads, kv_heads, vocabulary, context = _HEADER.unpack_from(content)
    head = width // heads
    at = _HEADER.size

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(shape))
        values = np.frombuffer(content, "<f4", count, at).reshape(shape)
        at += 4 * count
        return torch.tensor(values)

    def half_split(weight: torch.Tensor, n: int) -> torch.Tensor:
        """Rows of a rotary projection from interleaved pairs (llama2.c) to two halves (transformers)."""
        return weight.view(n, head // 2, 2, width).transpose(1, 2).reshape(n * head, width)

    embedding, input_norm = take(vocabulary, width), take(layers, width)
    q, k, v, o = (take(layers, rows, width) for rows in (width, kv_heads * head, kv_heads * head, width))
    mlp_norm, gate = take(layers, width), take(layers, hidden, width)
    down, up = take(layers, width, hidden), take(layers, hidden, width)
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(width)}
    take(2, context, head // 2)  # rotary tables: computed by the model
    for i in range(layers):
        state |= {
            f"model.layers.{i}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": input_norm[i],
                "post_attention_layernorm": mlp_norm[i],
                "self_attn.q_proj": half_split(q[i], heads),
                "self_attn.k_proj": half_split(k[i], kv_heads),
                "self_attn.v_proj": v[i],
                "self_attn.o_proj": o[i],
                "mlp.gate_proj": gate[i],
                "mlp.up_proj": up[i],
                "mlp.down_proj": down[i],
            }.items()
        }
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )
    save_weights(folder, state, config.to_diff_dict())
    _save_tokenizer(folder, _pieces(content[at:], vocabulary), context)


def _pieces(data: bytes, vocabulary: int) -> list[tuple[str, float]]:
    """(piece, score) by id: a maximal length, then per piece a float score, a length and the UTF-8 bytes."""
    at, out = 4, []
    for _ in range(vocabulary):
        score, size = struct.unpack_from("<fi", data, at)
        at += 8
        out.append((data[at : at + size].decode("utf-8"), score))
        at += size
    return out


def _save_tokenizer(folder: Path, pieces: list[tuple[str, float]], context: int) -> None:
    """A byte-pair encoding that, like SentencePiece, always merges the pair whose result scores highest."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    # after them a piece for every byte, which stands for characters that have no piece of their own
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    names = specials + single + [piece.replace(" ", "▁") for piece, _ in pieces[3 + 256 :]]
    ids = {name: i for i, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for name in sorted(names[3 + 256 :], key=lambda name: -pieces[ids[name]][1])
        for cut in range(1, len(name))
        if name[:cut] in ids and name[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",  # the vocabulary has no padding piece; padded positions carry no attention and no loss
        model_max_length=context,
    ).save_pretrained(folder)
