"""How each architecture spells the neutral parts of a network: data only, read by `inlay.core.anatomy`.

A spelling is a module path, optionally with marks: `entry>path` where the part's input and output are at two modules,
`path@param` where the matrix is not the module's `weight`, `path#rule` where it is some output rows of a packed matrix
(the rule, one of `ROWS`, picks them by the last word of the neutral name). Of several spellings the first that exists
in the model at hand is used; a part that exists nowhere is left out.

The module trees are those of transformers 5.23 (ViT also as older releases have it) and torch 2.13, which the tests
build, and timm's published ones, which the tests imitate. One table, long because there are many architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import nn

Spelling = str | tuple[str, ...]
Names = Mapping[str, Spelling]


@dataclass(frozen=True)
class Tower:
    """One stack of blocks: where it lies, what its blocks hold, and what stands before and after them."""

    kind: str
    """`text`, `vision` or `audio`; also an alias for a tower that stands alone."""
    blocks: Spelling
    """The container of blocks, from the tower's root."""
    block: Names
    """Neutral name -> spelling, from a block."""
    once: Names = field(default_factory=dict)
    """Neutral name -> spelling, from the tower's root."""
    beside: Names = field(default_factory=dict)
    """Neutral name -> spelling, from the root of the task model."""
    trim: Spelling = ()
    """The module after which only pooling and heads follow, from the tower's root."""
    signature: Spelling = ()
    """What block 0 must have for this to be the tower; by default the first entry of `block`."""
    name: str = ""
    """Prefix of the neutral names in a model of several towers."""
    at: str = ""
    """The tower's root, from the backbone."""
    config: str = ""
    """Sub-configuration that describes the tower."""
    heads: str = "num_attention_heads"
    """Configuration entry with the number of attention heads."""
    interface: bool = True
    """Whether attention calls the function that transformers' attention interface selects."""
    gather: tuple[str, ...] = ()
    """Parts whose convolutions and norms are numbered in order of definition: `stem.conv[0]`, `block[1].norm[2]`."""
    whole: bool = True
    """Whether a block is a module of its own."""
    finer: Names = field(default_factory=dict)
    """As `block`: places within these parts, which go by their own names only (a glob would count them twice)."""


def _qkvo(part: str, where: str, qkv: str, o: str) -> dict[str, Spelling]:
    """The four projections of one attention: `qkv` lists three names under `where` (or one packed), `o` is a path."""
    names = qkv.split()
    names = names * 3 if len(names) == 1 else names
    return {**{f"{part}.{x}": f"{where}.{name}" for x, name in zip("qkv", names, strict=True)}, f"{part}.o": o}


# ------------------------------------------------------------------------------------------------ encoders of text
BERT_BLOCK: Names = {
    **_qkvo("attn", "attention.self", "query key value", "attention.output.dense"),
    "attn": "attention.self>attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    **_qkvo("cross", "crossattention.self", "query key value", "crossattention.output.dense"),
    "cross": "crossattention.self>crossattention.output.dense",
    "cross_norm": "crossattention.output.LayerNorm",
    "mlp": "intermediate.dense>output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "norm2": "output.LayerNorm",
}
BERT_ONCE: Names = {
    "embed": "embeddings.word_embeddings",
    "embed.position": "embeddings.position_embeddings",
    "embed.type": "embeddings.token_type_embeddings",
    "embed.norm": "embeddings.LayerNorm",
    "embed.widen": ("embeddings_project", "embeddings.embed_proj"),  # ELECTRA, DeBERTa
    "embed.relative": ("encoder.relative_attention_bias", "encoder.rel_embeddings"),  # MPNet, DeBERTa
    "embed.relative_norm": "encoder.LayerNorm",
    "pool": "pooler.dense",
}
BERT = Tower("text", "encoder.layer", BERT_BLOCK, BERT_ONCE, trim="encoder")
DEBERTA = replace(
    BERT,
    block={
        **BERT_BLOCK,
        **_qkvo("attn", "attention.self", "query_proj key_proj value_proj", "attention.output.dense"),
    },
    interface=False,
)
MPNET = replace(
    BERT,
    block={
        **BERT_BLOCK,
        **_qkvo("attn", "attention.attn", "q k v", "attention.attn.o"),
        "attn": "attention.attn",
        "norm1": "attention.LayerNorm",
    },
    interface=False,
)
DISTILBERT = Tower(
    "text",
    "transformer.layer",
    {
        **_qkvo("attn", "attention", "q_lin k_lin v_lin", "attention.out_lin"),
        "attn": "attention",
        "norm1": "sa_layer_norm",
        "mlp": "ffn",
        "mlp.up": "ffn.lin1",
        "mlp.down": "ffn.lin2",
        "norm2": "output_layer_norm",
    },
    BERT_ONCE,
    trim="transformer",
)

# ------------------------------------------------------------------------------------------------ decoders of text
LLAMA_BLOCK: Names = {
    **_qkvo("attn", "self_attn", "q_proj k_proj v_proj", "self_attn.o_proj"),
    "attn": "self_attn",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "norm1": "input_layernorm",
    "mlp": "mlp",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "norm2": "post_attention_layernorm",
}
LLAMA = Tower("text", "layers", LLAMA_BLOCK, {"embed": "embed_tokens", "norm": "norm"}, trim="norm")
GEMMA2 = replace(
    LLAMA,
    block={
        **LLAMA_BLOCK,
        "post_norm1": "post_attention_layernorm",
        "norm2": "pre_feedforward_layernorm",
        "post_norm2": "post_feedforward_layernorm",
    },
)
MOE = replace(
    LLAMA,
    block={
        **LLAMA_BLOCK,
        "router": "mlp.gate",
        "mlp.experts.gate_up": "mlp.experts@gate_up_proj",
        "mlp.experts.down": "mlp.experts@down_proj",
        "mlp.shared.gate": "mlp.shared_expert.gate_proj",
        "mlp.shared.up": "mlp.shared_expert.up_proj",
        "mlp.shared.down": "mlp.shared_expert.down_proj",
        "shared_router": "mlp.shared_expert_gate",
    },
)
GPT_OSS = replace(MOE, block={**MOE.block, "router": "mlp.router"})
PHI = Tower(
    "text",
    "layers",
    {
        **_qkvo("attn", "self_attn", "q_proj k_proj v_proj", "self_attn.dense"),
        "attn": "self_attn",
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
        "norm1": "input_layernorm",  # one norm feeds attention and MLP, which run side by side
        "mlp": "mlp",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    },
    {"embed": "embed_tokens", "norm": "final_layernorm"},
    trim="final_layernorm",
)
PHI3 = replace(
    LLAMA,
    block={
        **LLAMA_BLOCK,
        **_qkvo("attn", "self_attn", "qkv_proj#grouped", "self_attn.o_proj"),
        "mlp.gate": "mlp.gate_up_proj#halves",
        "mlp.up": "mlp.gate_up_proj#halves",
    },
)
GPT2 = Tower(
    "text",
    "h",
    {
        **_qkvo("attn", "attn", "c_attn#thirds", "attn.c_proj"),
        "attn": "attn",
        "norm1": "ln_1",
        **_qkvo("cross", "crossattention", "q_attn c_attn#halves c_attn#halves", "crossattention.c_proj"),
        "cross": "crossattention",
        "cross_norm": "ln_cross_attn",
        "mlp": "mlp",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
        "norm2": "ln_2",
    },
    {"embed": "wte", "embed.position": "wpe", "norm": "ln_f"},
    trim="ln_f",
)
NEOX = Tower(
    "text",
    "layers",
    {
        **_qkvo("attn", "attention", "query_key_value#per_head", "attention.dense"),
        "attn": "attention",
        "norm1": "input_layernorm",
        "mlp": "mlp",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
        "norm2": "post_attention_layernorm",
    },
    {"embed": "embed_in", "norm": "final_layer_norm"},
    trim="final_layer_norm",
)
FALCON = Tower(
    "text",
    "h",
    {
        **_qkvo("attn", "self_attention", "query_key_value#falcon", "self_attention.dense"),
        "attn": "self_attention",
        "norm1": ("input_layernorm", "ln_attn"),
        "mlp": "mlp",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
        "norm2": ("post_attention_layernorm", "ln_mlp"),
    },
    {"embed": "word_embeddings", "embed.norm": "word_embeddings_layernorm", "norm": "ln_f"},
    trim="ln_f",
    interface=False,  # FalconAttention computes attention itself, whatever implementation is set
)
BLOOM = replace(
    FALCON,
    block={  # attention and MLP modules add the residual themselves, so these parts end at the last projection
        **FALCON.block,
        **_qkvo("attn", "self_attention", "query_key_value#per_head", "self_attention.dense"),
        "attn": "self_attention>self_attention.dense",
        "mlp": "mlp>mlp.dense_4h_to_h",
    },
)
MAMBA = Tower(
    "text",
    "layers",
    {
        "mixer.in": "mixer.in_proj",
        "mixer.conv": "mixer.conv1d",
        "mixer.x": "mixer.x_proj",
        "mixer.dt": "mixer.dt_proj",
        "mixer.out": "mixer.out_proj",
        "mixer": "mixer",
        "norm1": "norm",
    },
    {"embed": "embeddings", "norm": "norm_f"},
    trim="norm_f",
    interface=False,
    finer={  # the state space: its input u and gate z, A (as its logarithm), and the projections that give B and C
        "mixer.u": "mixer.in_proj#halves",
        "mixer.z": "mixer.in_proj#halves",
        "mixer.A": "mixer@A_log",
        "mixer.B": "mixer.x_proj#ssm",
        "mixer.C": "mixer.x_proj#ssm",
    },
)

# ------------------------------------------------------------------------------------------------ encoder-decoders
T5_BLOCK: Names = {
    **_qkvo("attn", "layer.0.SelfAttention", "q k v", "layer.0.SelfAttention.o"),
    "attn": "layer.0.SelfAttention",
    "norm1": "layer.0.layer_norm",
}
T5_ENCODER = Tower(
    "text",
    "block",
    {
        **T5_BLOCK,
        "mlp": "layer.1.DenseReluDense",
        "mlp.gate": "layer.1.DenseReluDense.wi_0",
        "mlp.up": ("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_1"),
        "mlp.down": "layer.1.DenseReluDense.wo",
        "norm2": "layer.1.layer_norm",
    },
    {
        "embed": "embed_tokens",  # each stack calls its own table; `shared` only ties them and is never called
        "embed.relative": "block.0.layer.0.SelfAttention.relative_attention_bias",
        "norm": "final_layer_norm",
    },
    trim="final_layer_norm",
    signature="layer.1.DenseReluDense",
    name="encoder",
    at="encoder",
)
T5_DECODER = replace(
    T5_ENCODER,
    block={
        **T5_BLOCK,
        **_qkvo("cross", "layer.1.EncDecAttention", "q k v", "layer.1.EncDecAttention.o"),
        "cross": "layer.1.EncDecAttention",
        "cross_norm": "layer.1.layer_norm",
        "mlp": "layer.2.DenseReluDense",
        "mlp.gate": "layer.2.DenseReluDense.wi_0",
        "mlp.up": ("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wi_1"),
        "mlp.down": "layer.2.DenseReluDense.wo",
        "norm2": "layer.2.layer_norm",
    },
    signature="layer.1.EncDecAttention",
    name="decoder",
    at="decoder",
)
BART_ENCODER = Tower(
    "text",
    "layers",
    {
        **_qkvo("attn", "self_attn", "q_proj k_proj v_proj", "self_attn.out_proj"),
        "attn": "self_attn",
        "norm1": "self_attn_layer_norm",
        **_qkvo("cross", "encoder_attn", "q_proj k_proj v_proj", "encoder_attn.out_proj"),
        "cross": "encoder_attn",
        "cross_norm": "encoder_attn_layer_norm",
        "mlp": "fc1>fc2",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
        "norm2": "final_layer_norm",
    },
    {
        "embed": "embed_tokens",
        "embed.position": "embed_positions",
        "embed.norm": "layernorm_embedding",
        "norm": ("layer_norm", "final_layer_norm"),
    },
    trim=("layer_norm", "final_layer_norm", ""),
    name="encoder",
    at="encoder",
)
BART_DECODER = replace(BART_ENCODER, name="decoder", at="decoder", heads="decoder_attention_heads")
WHISPER_ENCODER = replace(
    BART_ENCODER, kind="audio", once={"stem.conv[0]": "conv1", "stem.conv[1]": "conv2", **BART_ENCODER.once}
)
OPT = replace(BART_ENCODER, name="", at="decoder")

# ------------------------------------------------------------------------------------------------ vision, audio
VIT = Tower(
    "vision",
    ("layers", "encoder.layer"),
    {
        "attn.q": ("attention.q_proj", "attention.attention.query"),
        "attn.k": ("attention.k_proj", "attention.attention.key"),
        "attn.v": ("attention.v_proj", "attention.attention.value"),
        "attn.o": ("attention.o_proj", "attention.output.dense"),
        "attn": ("attention.attention>attention.output.dense", "attention"),
        "norm1": ("norm1", "layernorm_before"),
        "scale1": "layer_scale1",
        "mlp": ("mlp", "intermediate.dense>output.dense"),
        "mlp.gate": ("mlp.gate_proj", "mlp.weights_in#halves"),
        "mlp.up": ("mlp.fc1", "mlp.up_proj", "mlp.weights_in#halves", "intermediate.dense"),
        "mlp.down": ("mlp.fc2", "mlp.down_proj", "mlp.weights_out", "output.dense"),
        "norm2": ("norm2", "layernorm_after"),
        "scale2": "layer_scale2",
    },
    {
        "patch": "embeddings.patch_embeddings.projection",
        "embed": "embeddings",  # the module that outputs the tokens: patches, class token, positions
        "embed.class": "embeddings@cls_token",
        "norm": "layernorm",
        "pool": "pooler.dense",
    },
    trim="layernorm",
)
CLIP_BLOCK: Names = {
    **_qkvo("attn", "self_attn", "q_proj k_proj v_proj", "self_attn.out_proj"),
    "attn": "self_attn",
    "norm1": "layer_norm1",
    "mlp": "mlp",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "norm2": "layer_norm2",
}
CLIP_TEXT = Tower(
    "text",
    "encoder.layers",
    CLIP_BLOCK,
    {
        "embed": "embeddings.token_embedding",
        "embed.position": "embeddings.position_embedding",
        "norm": "final_layer_norm",
        "pool": "head",  # SigLIP
    },
    {"proj": "text_projection"},
    trim="final_layer_norm",
    name="text",
    at="text_model",
    config="text_config",
)
CLIP_VISION = Tower(
    "vision",
    "encoder.layers",
    CLIP_BLOCK,
    {
        "patch": "embeddings.patch_embedding",
        "embed": "embeddings",
        "embed.class": "embeddings@class_embedding",
        "embed.position": "embeddings.position_embedding",
        "embed.norm": "pre_layrnorm",
        "norm": "post_layernorm",
    },
    {"proj": "visual_projection"},
    trim="encoder",  # post_layernorm sees the pooled vector only
    name="vision",
    at="vision_model",
    config="vision_config",
)
SIGLIP_VISION = replace(
    CLIP_VISION,
    once={
        **CLIP_VISION.once,
        "pool": "head",
        **_qkvo("pool", "head", "attention@in_proj_weight#thirds", "head.attention.out_proj"),
        "pool.norm": "head.layernorm",
        "pool.up": "head.mlp.fc1",
        "pool.down": "head.mlp.fc2",
    },
    trim="post_layernorm",
)
WAV2VEC2 = Tower(
    "audio",
    "encoder.layers",
    {
        **_qkvo("attn", "attention", "q_proj k_proj v_proj", "attention.out_proj"),
        "attn": "attention",
        "norm1": "layer_norm",
        "mlp": "feed_forward",
        "mlp.up": "feed_forward.intermediate_dense",
        "mlp.down": "feed_forward.output_dense",
        "norm2": "final_layer_norm",
    },
    {
        "stem": "feature_extractor",
        "embed.norm": "feature_projection.layer_norm",
        "embed": "feature_projection.projection",
        "embed.position": "encoder.pos_conv_embed.conv",
        "norm": "encoder.layer_norm",  # before the blocks in post-norm models, after them in pre-norm ones
    },
    trim="encoder",
    gather=("stem",),
)
RESNET = Tower(
    "vision",
    "encoder.stages",
    {},
    {"stem": "embedder"},
    signature="layers",
    interface=False,
    gather=("block", "stem"),
)
MOBILENET_V2 = Tower(
    "vision",
    "layer",
    {},
    {"stem": "conv_stem", "neck": "conv_1x1"},
    signature="conv_3x3",
    interface=False,
    gather=("block", "stem", "neck"),
)

# ------------------------------------------------------------------------------------------------ by `model_type`
FAMILIES: Mapping[str, tuple[Tower, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), (BERT,)),
    "deberta-v2": (DEBERTA,),
    "mpnet": (MPNET,),
    "distilbert": (DISTILBERT,),
    **dict.fromkeys(("llama", "smollm3", "qwen2", "qwen3", "mistral", "gemma"), (LLAMA,)),
    **dict.fromkeys(("gemma2", "gemma3_text"), (GEMMA2,)),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), (MOE,)),
    "gpt_oss": (GPT_OSS,),
    "phi": (PHI,),
    "phi3": (PHI3,),
    "gpt2": (GPT2,),
    "gpt_neox": (NEOX,),
    "falcon": (FALCON,),
    "bloom": (BLOOM,),
    "opt": (OPT,),
    "mamba": (MAMBA,),
    **dict.fromkeys(("t5", "mt5"), (T5_ENCODER, T5_DECODER)),
    **dict.fromkeys(("bart", "mbart", "marian"), (BART_ENCODER, BART_DECODER)),
    "whisper": (WHISPER_ENCODER, BART_DECODER),
    **dict.fromkeys(("vit", "deit", "dinov2", "dinov2_with_registers"), (VIT,)),
    "clip": (CLIP_TEXT, CLIP_VISION),
    "clip_text_model": (replace(CLIP_TEXT, at="", config=""),),
    "clip_vision_model": (replace(CLIP_VISION, at="", config=""),),
    "siglip": (CLIP_TEXT, SIGLIP_VISION),
    "siglip_text_model": (replace(CLIP_TEXT, at="", config=""),),
    "siglip_vision_model": (replace(SIGLIP_VISION, at="", config=""),),
    **dict.fromkeys(("wav2vec2", "hubert"), (WAV2VEC2,)),
    "resnet": (RESNET,),
    "mobilenet_v2": (MOBILENET_V2,),
}

# ------------------------------------------------------------------------------------------------ by structure
TIMM_VIT = Tower(
    "vision",
    "",
    {
        **_qkvo("attn", "attn", "qkv#thirds", "attn.proj"),
        "attn": "attn",
        "q_norm": "attn.q_norm",
        "k_norm": "attn.k_norm",
        "norm1": "norm1",
        "scale1": "ls1",
        "mlp": "mlp",
        "mlp.gate": ("mlp.fc1_g", "mlp.w12#halves"),
        "mlp.up": ("mlp.fc1", "mlp.fc1_x", "mlp.w12#halves"),
        "mlp.down": ("mlp.fc2", "mlp.w3"),
        "norm2": "norm2",
        "scale2": "ls2",
    },
    {"patch": "patch_embed.proj", "embed": "pos_drop", "embed.class": "@cls_token", "norm": ("norm", "fc_norm")},
    {"head": "head"},
    trim="norm",
    interface=False,
)


def _stored(part: str, where: str) -> Names:
    """The projections of an `nn.MultiheadAttention`, packed or (with other key or value widths) apart."""
    qkv = {f"{part}.{x}": (f"{where}@in_proj_weight#thirds", f"{where}@{x}_proj_weight") for x in "qkv"}
    return {**qkv, f"{part}.o": f"{where}.out_proj".lstrip("."), part: where}


TORCH_ENCODER = Tower(
    "",
    "",
    {
        **_stored("attn", "self_attn"),
        "norm1": "norm1",
        "mlp": "linear1>linear2",
        "mlp.up": "linear1",
        "mlp.down": "linear2",
        "norm2": "norm2",
    },
    trim="",
    interface=False,
)
TORCH_DECODER = replace(
    TORCH_ENCODER,
    block={**TORCH_ENCODER.block, **_stored("cross", "multihead_attn"), "cross_norm": "norm2", "norm2": "norm3"},
)
TORCH_ATTENTION = Tower("", "", _stored("attn", ""), interface=False, whole=False)


@dataclass(frozen=True)
class Structure:
    """An architecture without a configuration, known by what its blocks hold."""

    architecture: str
    tower: Tower
    marks: Mapping[str, type[nn.Module]]
    """Path from the block -> class of the module there; all must hold."""
    bars: tuple[tuple[str, str], ...] = ()
    """(path from the block, tensor) that must not exist."""
    series: bool = True
    """Whether blocks whose paths differ by more than numbers are different towers."""


STRUCTURES: tuple[Structure, ...] = (
    # LeViT and TinyViT have the same names, attention biases, and rows that alternate head by head
    Structure(
        "timm-vit", TIMM_VIT, {"attn.qkv": nn.Linear, "attn.proj": nn.Linear}, bars=(("attn", "attention_biases"),)
    ),
    Structure("torch-transformer", TORCH_ENCODER, {"": nn.TransformerEncoderLayer}),
    Structure("torch-transformer", TORCH_DECODER, {"": nn.TransformerDecoderLayer}),
    Structure("torch-attention", TORCH_ATTENTION, {"": nn.MultiheadAttention}, series=False),
)

# ------------------------------------------------------------------------------------------------ task heads
HEADS = (
    "lm_head",
    "classifier",
    "score",
    "qa_outputs",
    "cls",
    "classification_head",
    "proj_out",
    "vocab_projector",
    "multiple_choice_head",
    "segmentation_head",
    "lm_predictions",
    "generator_lm_head",
    "discriminator_predictions",
)
"""Where task models keep their head, from the task model's root."""

HEAD_PARTS: Names = {
    "head.hidden": (
        "{head}.dense",
        "{head}.predictions.transform.dense",
        "pre_classifier",
        "projector",
        "vocab_transform",
    ),
    "head.norm": ("{head}.layer_norm", "{head}.predictions.transform.LayerNorm", "vocab_layer_norm"),
    "head.out": ("{head}.out_proj", "{head}.decoder", "{head}.predictions.decoder", "{head}.1"),
}
"""The layers of a head that has more than one, from the task model's root."""


# ------------------------------------------------------------------------------------------------ packed matrices
class Heads(NamedTuple):
    """Number of query heads, of key-value heads, and their width."""

    n: int
    kv: int
    size: int


def _runs(names: str, lengths: list[int]) -> dict[str, tuple]:
    """Consecutive runs of rows."""
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return {name: ("slice", stop - n, stop) for name, n, stop in zip(names.split(), lengths, stops, strict=True)}


def _per_group(groups: int, lengths: list[int]) -> dict[str, tuple]:
    """Query, key and value rows that take turns, group by group."""
    runs = _runs("q k v", lengths)
    return {name: ("heads", groups, sum(lengths), start, stop - start) for name, (_, start, stop) in runs.items()}


def _falcon(size: int, h: Heads, config: Any) -> dict[str, tuple]:
    if config.new_decoder_architecture:  # for every key-value head: its queries, one key, one value
        kv = config.num_kv_heads
        return _per_group(kv, [h.n // kv * h.size, h.size, h.size])
    if config.multi_query:
        return _runs("q k v", [h.n * h.size, h.size, h.size])
    return _per_group(h.n, [h.size] * 3)


ROWS: dict[str, Callable[[int, Heads, Any], dict[str, tuple]]] = {
    "thirds": lambda size, h, config: _runs("q k v", [size // 3] * 3),
    "halves": lambda size, h, config: {
        name: rows for pair in ("k v", "gate up", "u z") for name, rows in _runs(pair, [size // 2] * 2).items()
    },
    "grouped": lambda size, h, config: _runs("q k v", [h.n * h.size, h.kv * h.size, h.kv * h.size]),
    "per_head": lambda size, h, config: _per_group(h.n, [h.size] * 3),
    "falcon": _falcon,
    "ssm": lambda size, h, config: _runs("dt B C", [size - 2 * config.state_size, *[config.state_size] * 2]),
}
"""Rule -> last word of a neutral name -> `Part.rows`; from the packed size, the heads and the configuration."""
