"""Reference values of methods that transform W: counts of the papers, PEFT's own numbers, what the maps leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inlay
from inlay.core.method import Method
from inlay.methods import SSF
from inlay.plan import plan
from laws import nets
from laws.cases import stir
from laws.checks import close, gap, output

Q_V = ["attn.q", "attn.v"]
COUNTS = [
    # architecture, method, where, adapter parameters
    ("vit-base", "ssf", None, 205_824),
]


@pytest.mark.parametrize(("arch", "method", "where", "count"), COUNTS)
def test_adapter_parameters(arch: str, method: str, where: list[str] | None, count: int) -> None:
    assert plan(arch, method, where, memory=False).adapter_parameters == count


# ---------------------------------------------------------------------- SSF
def attached(model: nn.Module, method: Method, *where: str) -> inlay.Adapter:
    adapter = inlay.adapt(model, method, where or None)
    stir(adapter)
    return adapter


WORDS = {"input_ids": torch.randint(3, 32, (4, 6), generator=torch.Generator().manual_seed(0))}
BASES = {
    "linear": (nets.Residual, {"x": torch.randn(4, 3, 8)}, 7),  # up, down, out and their norm: LayerNorm
    "batchnorm": (nets.normalised, {"x": torch.randn(4, 3, 6, 5)}, 4),
    "llama": (nets.llama, WORDS, 2 * 9 + 1),  # RMSNorm and linear layers without bias
    "gemma": (nets.gemma, WORDS, None),  # RMSNorm with 1 + γ
    "gpt2": (nets.gpt2, WORDS, None),
    "bert": (nets.bert, WORDS, None),
    "vit": (nets.vit, {"pixel_values": torch.randn(4, 3, 8, 8)}, None),
    "encoder": (nets.Encoder, {"x": torch.randn(4, 5, 8)}, None),
}


@pytest.mark.parametrize("base", BASES)
def test_ssf_follows_every_operation_and_folds_into_it(base: str) -> None:
    make, inputs, tensors = BASES[base]
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    plain = output(model, inputs)
    adapter = attached(model, SSF())
    named = {level.site.path for level in adapter.levels}
    norms = {n for n, m in model.named_modules() if "norm" in type(m).__name__.lower() and not n.startswith("inlay")}
    assert norms
    assert norms <= named
    if tensors is not None:
        assert sum(1 for _ in adapter.parameters()) == tensors
    out = output(model, inputs)
    assert gap(plain, out) > 1e-2
    adapter.merge()
    close(out, output(model, inputs), 1e-5, "merged against adapted")
    adapter.unmerge()
    inlay.detach(model)
    assert torch.equal(plain, output(model.requires_grad_(False), inputs))
