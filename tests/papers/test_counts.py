"""Every parameter count of the papers' tables that is exact and belongs to a method at hand."""

import pytest

from inlay.plan import plan

Q_V = ["attn.q", "attn.v"]
LINEAR = ["all-linear"]
COUNTS = [
    # architecture, method, where, adapter parameters
    ("roberta-base", "lora(r=8)", Q_V, 294_912),
    ("roberta-large", "lora(r=8)", Q_V, 786_432),
    ("vit-base", "lora(r=8)", Q_V, 294_912),
    ("vit-large", "lora(r=8)", Q_V, 786_432),
    ("gpt2-medium", "lora(r=4)", Q_V, 393_216),
    ("gpt2-large", "lora(r=4)", Q_V, 737_280),
    ("llama-7b", "lora(r=64)", LINEAR, 159_907_840),
    ("llama-13b", "lora(r=64)", LINEAR, 250_347_520),
    ("roberta-base", "vera(r=1024)", Q_V, 43_008),
    ("roberta-base", "vera(r=512)", Q_V, 30_720),
    ("roberta-large", "vera(r=256)", Q_V, 61_440),
    ("gpt2-medium", "vera(r=1024)", Q_V, 98_304),
    ("gpt2-large", "vera(r=1024)", Q_V, 165_888),
    ("llama-7b", "vera(r=1024)", LINEAR, 1_589_248),
    ("llama-13b", "vera(r=1024)", LINEAR, 2_416_640),
    ("vit-base", "vera(r=256)", Q_V, 24_576),
    ("vit-large", "vera(r=256)", Q_V, 61_440),
    ("llama-7b", "dora(of=lora(r=64))", LINEAR, 161_267_712),
    ("llama-7b", "dora(of=vera(r=1024))", LINEAR, 2_949_120),
    ("gpt2-medium", "dylora(of=lora(r=4))", Q_V, 393_216),
    ("roberta-base", "bitfit", None, 102_144),
    ("roberta-base", "bitfit(norms=False)", None, 82_944),
    ("roberta-large", "bitfit", None, 271_360),
]
BASES = {
    # without pooler and task head, as the papers count full fine-tuning of encoders; language models with theirs
    "roberta-base": 124_055_040,
    "roberta-large": 354_310_144,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama3-8b": 8_030_261_248,
    "vit-base": 85_798_656,
    "vit-large": 303_301_632,
}


@pytest.mark.parametrize(("arch", "method", "where", "count"), COUNTS)
def test_adapter_parameters(arch, method, where, count):
    assert plan(arch, method, where, memory=False).adapter_parameters == count


@pytest.mark.parametrize(
    ("arch", "where", "times"),
    [
        ("roberta-large", Q_V, 2.0),
        ("llama-7b", ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"], 2.0),
        ("llama-7b", LINEAR, 1.84),  # gate and up are wide in outputs, which B is as long as; down alone in inputs
    ],
)
def test_lora_trains_twice_what_lorafa_does_where_widths_are_even(arch, where, times):
    lora, lorafa = (plan(arch, f"{name}(r=8)", where, memory=False).adapter_parameters for name in ("lora", "lorafa"))
    assert round(lora / lorafa, 2) == times


@pytest.mark.parametrize("arch", BASES)
def test_base_parameters(arch):
    found = plan(arch, "lora(r=1)", memory=False)
    assert found.base_parameters - found.head_parameters == BASES[arch]


def test_the_head_is_counted_apart():
    found = plan("roberta-base", "vera(r=512)", Q_V, memory=False)
    assert found.head_parameters == 592_130
    assert found.base_parameters + found.adapter_parameters + found.head_parameters == 125_270_020
    assert found.base_parameters == 124_647_170


@pytest.mark.parametrize(("method", "percent"), [("lora(r=64)", 2.31), ("dora(of=lora(r=64))", 2.33)])
def test_dora_table_percentages_are_of_base_and_adapter_truncated(method, percent):
    found = plan("llama-7b", method, LINEAR, memory=False)
    share = 100 * found.adapter_parameters / (found.base_parameters + found.adapter_parameters)
    assert int(share * 100) / 100 == percent
