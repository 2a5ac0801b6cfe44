"""What methods may refuse, with the reason they must give. Everything else must be supported."""

from __future__ import annotations

from laws.cases import Case

MAPS = {"conv1d", "conv1d-same", "conv1d-point", "conv2d", "conv2d-groups", "conv2d-depthwise", "conv2d-same",
        "conv3d", "batchnorm"}  # fmt: skip
GROUPED = {"conv1d-same", "conv1d-point", "conv2d-groups", "conv2d-depthwise", "conv3d"}
TABLES = {"embedding", "embedding-tied"}
UNSEEN = {"mha", "mha-split", "encoder", "encoder-padded", "mixtral", "qwen-moe", "gpt-oss"}
TEXTS = {"gpt2-mlp", "gemma", "neox", "falcon", "mixtral", "qwen-moe", "gpt-oss", "bert", "classifier", "llama"}
PACKED = {"int8-tensor", "int8-module", "nf4", "int4", "int8"}

PARALLEL = ("ParallelAdapter", "AdaptFormer", "LLMParallel")
ABLATIONS = ("NoReFT", "ConsReFT", "LobiReFT")

REFUSALS: list[tuple[str, set[str], str]] = [
    # nothing there to train
    ("NormTuning", {*MAPS - {"batchnorm"}, *TABLES, *PACKED, "head-tied", "mha", "mha-split", "lstm"}, "finds nothing"),
    ("BitFit", {"conv2d-groups", "gemma", "llama", "mixtral", "qwen-moe"}, "finds nothing"),
    # activations of another kind than the method's equation speaks of
    ("LoReFT", MAPS, "edits a sequence of hidden states, 'conv' gives a map"),
    ("DiReFT", MAPS, "edits a sequence of hidden states, 'conv' gives a map"),
    *((name, MAPS, "edits a sequence of hidden states, 'conv' gives a map") for name in ABLATIONS),
    *((name, MAPS, "needs vectors at 'conv', which reads a map") for name in PARALLEL),
    *((name, TABLES, "needs vectors at 'table', which reads ids") for name in PARALLEL),
    ("KronAB", MAPS, "needs vectors at 'conv', which reads a map"),
    ("KronAB", TABLES, "needs vectors at 'table', which reads ids"),
    ("Compacter", {"conv2d-same", "head-tied"}, "n = 2 does not divide the width"),
    # inputs that a method which starts from them could not see
    ("EVA", TABLES, "starts from the vectors a matrix acts on, but 'table' reads ids"),
    ("CorDA", TABLES, "starts from the vectors a matrix acts on, but 'table' reads ids"),
    ("EVA", {"gemma"}, "but 'model.embed_tokens' reads ids"),
    ("CorDA", {"gemma"}, "but 'model.embed_tokens' reads ids"),
    ("EVA", UNSEEN, "are out of sight: other code than the module's own forward applies it"),
    ("SCT", TABLES, "starts from the vectors a matrix acts on, but 'table' reads ids"),
    ("SCT", {"gemma"}, "but 'model.embed_tokens' reads ids"),
    ("SCT", UNSEEN, "are out of sight: other code than the module's own forward applies it"),
    ("CorDA", UNSEEN, "are out of sight: other code than the module's own forward applies it"),
    # widths that m butterfly factors cannot be cut for
    (
        "BOFT(block_size=2",
        MAPS - {"conv1d", "conv1d-same"} | TABLES | {"head-tied", "mha-split"},
        r"features to rotate, which cannot be cut into a multiple of 2 blocks of even size",
    ),
    # what W of a grouped convolution cannot express
    ("SCT", GROUPED, "would mix the outputs of different groups of 'conv'"),
    ("RoAd", {"conv1d-same", "conv2d-groups"}, "would mix the outputs of different groups of 'conv'"),
    # no seam in the base's own code where the method could enter
    ("VPT", TEXTS, "puts vectors among the hidden states of image patches"),
    ("PGN", TEXTS, "puts vectors among the hidden states of image patches"),
    *((name, {"vit"}, "its forward has no `inputs_embeds`") for name in ("PromptTuning", "PTuning", "DePT")),
    ("LongLoRA", {"bert", "classifier", "vit"}, "is for decoders that stand alone: .* has no causal attention"),
    ("LongLoRA", {"gpt-oss"}, "computes plain causal attention, but GptOssAttention also has s_aux"),
    ("LongLoRA", {"falcon"}, "finds no attention .* that goes through transformers' attention interface"),
    ("LongLoRA(stretch", {"gpt2-mlp", "gemma"}, "stretches rotary positions, and '.*' has none of a single kind"),
    *(
        (name, {"falcon"}, "finds no attention .* that goes through transformers' attention interface")
        for name in ("PrefixTuning", "PTuningV2", "LLaMAAdapter")
    ),
    ("LLaMAAdapter", {"bert", "classifier", "vit"}, "is for decoders that stand alone: .* has no causal attention"),
    ("LLaMAAdapter", {"gpt-oss"}, "plain causal attention, but GptOssAttention also has s_aux"),
    # what would let a token see those after it
    (
        "UniPT",
        {"gpt2-mlp", "gemma", "neox", "falcon", "mixtral", "qwen-moe", "gpt-oss", "llama"},
        "is for encoders: it mixes all tokens of a sequence, and '.*' ends a decoder",
    ),
    # another kind of network
    ("SDT", {"llama"}, "is for the architecture 'mamba', and this LlamaForCausalLM is none"),
    ("StateOffset", {"llama"}, "is for the architecture 'mamba', and this LlamaForCausalLM is none"),
    # a stored number of few bits cannot be trained
    ("GaLore", PACKED, "which is quantised: leave it out with exclude="),
    ("Full", PACKED, "which is quantised: leave it out with exclude="),
]
"""Method (its name, or its label's beginning), benches, pattern of the reason."""


def refused(case: Case) -> str | None:
    """A pattern of the reason if this method must refuse this bench, else None."""
    for method, benches, reason in REFUSALS:
        label = case.method.label()
        if (
            label.startswith(method) if "(" in method else type(case.method).__name__ == method
        ) and case.bench.name in benches:
            return reason
    return None
