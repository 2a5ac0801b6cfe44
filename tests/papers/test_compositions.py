"""Methods made of methods, and several at one place, on pretrained models: dense equation, training, files, merging.

MiniLM throughout, and stories15M stored in NF4 for QLoRA of VeRA. The oracles are those of the laws.
"""

from __future__ import annotations

import copy
import functools
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import inlay
import inlay.models
from inlay.core.adapter import Adapter
from inlay.core.errors import ComposeError, InlayError, MergeError
from inlay.core.method import Method, Placement
from inlay.methods import (
    BOFT,
    OFT,
    SSF,
    SVFT,
    AdaLoRA,
    BitFit,
    DoRA,
    DyLoRA,
    Full,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    ReLoRA,
    RoAd,
    VBLoRA,
    VeRA,
    WeightNorm,
)
from inlay.methods.schedule.dylora import use_rank
from inlay.models.quantise import quantise
from laws.oracles import ORACLES, given

SENTENCES = [
    "the film is a quiet triumph", "an hour too long , and it shows", "who wrote this ?", "a joy from first to last",
    "dull , loud and proud of it", "funny in all the right places", "I left before the end", "see it twice",
]  # fmt: skip
LABELS = torch.tensor([1, 0, 0, 1, 0, 1, 0, 1])
Q_V = ["attn.q", "attn.v"]
Made = Method | Placement | list[Method | Placement]


@functools.cache
def opened() -> tuple[nn.Module, dict[str, Tensor]]:
    found = inlay.models.open("minilm", "text-classification", num_labels=2)
    return found.model.eval(), dict(found.processor(SENTENCES, return_tensors="pt", padding=True))


@functools.cache
def stories() -> tuple[nn.Module, dict[str, Tensor]]:
    found = inlay.models.open("stories15m", "causal-lm")
    found.processor.pad_token = found.processor.pad_token or found.processor.eos_token
    texts = ["Once upon a time there was a little dog", "Tom and Sue went to the park to play"]
    call = dict(found.processor(texts, return_tensors="pt", padding=True))
    call.pop("token_type_ids", None)
    model = found.model.eval()
    quantise(model, "nf4")
    return model, call


def minilm() -> nn.Module:
    return copy.deepcopy(opened()[0])


@torch.no_grad()
def output(model: nn.Module, call: dict[str, Tensor] | None = None) -> Tensor:
    return model(**(call or opened()[1])).logits.clone()


def fit(model: nn.Module, adapter: Adapter, rate: float, steps: int = 8) -> list[float]:
    """Losses of a few steps on one batch."""
    call = opened()[1]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate)
    torch.manual_seed(0)
    losses = []
    for step in range(steps):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()  # so that losses can be compared
        loss = model(**call, labels=LABELS).loss + inlay.penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        inlay.step(model, (step + 1) / steps, optimizer)
        losses.append(loss.item())
    model.eval()
    return losses


def dense(model: nn.Module, base: nn.Module) -> nn.Module:
    """A plain copy of the base with W′ and b′ in place, computed by the oracles in float64, the first method first."""
    plain = copy.deepcopy(base)
    heads = [level for level in model.inlay.adapters["default"].children() if type(level).__name__ == "Head"]
    for head in heads:
        plain.get_parameter(f"{head.site.path}.{head.site.param}").data.copy_(head.value)
    for level in (method for method in model.inlay.adapters["default"].children() if method not in heads):
        site = level.site
        module = plain.get_submodule(site.path)
        shared = {name: site.shared_now(name) for name in site.uses}
        b = None if module.bias is None else module.bias.detach().double()
        W, b = ORACLES[level.name()](module.weight.detach().double(), b, given(level, shared))
        module.weight.data.copy_(W)
        if b is not None:
            module.bias.data.copy_(b)
    return plain


COMPOSITIONS: dict[str, tuple[Made, float]] = {
    "DVoRA": (DoRA(of=VeRA(r=64)), 1e-2),
    "DoRA of LoKr": (DoRA(of=LoKr(r=4)), 1e-2),
    "DyLoRA of VeRA": (DyLoRA(of=VeRA(r=64)), 1e-2),
    "ReLoRA of VeRA": (ReLoRA(of=VeRA(r=64), restarts=1, warmup=1), 1e-2),
    "LoRA, VeRA": ([LoRA(r=4), VeRA(r=64)], 3e-3),
    "OFT, LoRA": ([OFT(block_size=16), LoRA(r=4)], 3e-3),
    "DoRA, LoHa": ([DoRA(), LoHa(r=4)], 3e-3),
    "LoKr, RoAd": ([LoKr(r=4), RoAd()], 3e-3),
    "SVFT, BOFT": ([SVFT(), BOFT(block_size=16)], 3e-3),
}


@pytest.mark.parametrize("case", COMPOSITIONS)
def test_on_minilm(case: str, tmp_path: Path) -> None:
    """It starts at the base, learns, equals the dense equation, is saved and loaded to the bit, and merges."""
    methods, rate = COMPOSITIONS[case]
    base = opened()[0]
    model = minilm()
    adapter = inlay.adapt(model, methods, Q_V)
    close(output(model), output(base))
    losses = fit(model, adapter, rate)
    assert min(losses[-2:]) < 0.9 * losses[0], losses
    trained = output(model)
    assert (trained - output(base)).abs().max() > 0.05
    close(trained, output(dense(model, base)))
    assert all(
        torch.equal(p, dict(base.named_parameters())[n]) for n, p in model.named_parameters() if "inlay" not in n
    )

    adapter.save(str(tmp_path / "saved"))
    again = minilm()
    inlay.load(again, tmp_path / "saved")
    assert torch.equal(output(again), trained)

    adapter.merge()
    close(output(model), trained)
    adapter.unmerge()
    assert torch.equal(output(model), trained)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_dylora_of_vera_serves_at_every_rank(tmp_path: Path) -> None:
    """One trained adapter, cut to its leading ranks: the dense equation with as many rows of the shared projections."""
    base, model = opened()[0], minilm()
    adapter = inlay.adapt(model, DyLoRA(of=VeRA(r=16)), Q_V)
    fit(model, adapter, 1e-2, 3)
    outputs = []
    for rank in (1, 5, 16):
        use_rank(adapter, rank)
        outputs.append(output(model))
        close(outputs[-1], output(dense(model, base)))
        adapter.save(str(tmp_path / str(rank)))
        again = minilm()
        inlay.load(again, tmp_path / str(rank))
        assert torch.equal(output(again), outputs[-1])
    assert all((a - b).abs().max() > 1e-4 for a, b in pairwise(outputs))


def test_qlora_of_vera(tmp_path: Path) -> None:
    """VeRA on stories15M stored in NF4: its oracle on the numbers the codes stand for, training, files, merging."""
    base, call = stories()
    model = copy.deepcopy(base)
    plain = output(base, call)
    adapter = inlay.adapt(model, VeRA(r=64), Q_V)
    close(output(model, call), plain)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-2)
    losses = []
    for _ in range(8):
        loss = model(**call, labels=call["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0], losses
    trained = output(model, call)

    by_hand = copy.deepcopy(base)
    for level in adapter.levels:
        site = level.site
        shared = {name: site.shared_now(name) for name in site.uses}
        W, _ = ORACLES["vera"](base.get_submodule(site.path).dequantize().double(), None, given(level.method, shared))
        layer = nn.Linear(site.d_in, site.d_out, bias=False)
        layer.weight.data.copy_(W)
        by_hand.set_submodule(site.path, layer)
    torch.testing.assert_close(trained, output(by_hand, call), atol=2e-4, rtol=1e-3)

    adapter.save(str(tmp_path))
    again = copy.deepcopy(base)
    inlay.load(again, tmp_path)
    assert torch.equal(output(again, call), trained)
    with pytest.raises(MergeError, match="quantised"):
        adapter.merge()
    adapter.merge(dequantise=True)
    torch.testing.assert_close(output(model, call), trained, atol=2e-4, rtol=1e-3)
    adapter.unmerge()
    assert torch.equal(output(model, call), trained)


REFUSED: dict[str, tuple[Made, str]] = {
    "DoRA second": (
        [LoRA(), DoRA()],
        r"DoRA reads W at '.*query', so it must come first there, but LoRA already acts on it: list DoRA first, or "
        r"compose it as `of=`",
    ),
    "two DoRAs": ([DoRA(), DoRA(of=VeRA())], "DoRA.* reads W at '.*query', so it must come first there, but DoRA"),
    "weight norm after": ([VeRA(), WeightNorm()], "WeightNorm reads W at '.*query', so it must come first there"),
    "GLoRA after": ([OFT(), GLoRA()], "GLoRA reads W at '.*query', so it must come first there, but OFT"),
    "DoRA beside a copy": ([DoRA(), Full()], "Full replaces the tensor that DoRA reads at '.*query"),
    "two copies": ([Full(), BitFit()], "two methods train their own copy of '.*query.bias': keep one of them"),
    "DoRA of a rotation": (lambda: DoRA(of=OFT()), "DoRA.*'of' must be"),
    "DoRA of DoRA": (lambda: DoRA(of=DoRA()), "DoRA.*'of' must be"),
    "DyLoRA of LoHa": (DyLoRA(of=LoHa()), "DyLoRA needs an update B A, which LoHa does not have"),
    "ReLoRA of LoKr": (ReLoRA(of=LoKr()), "ReLoRA needs an update B A, which LoKr does not have"),
    "ReLoRA of AdaLoRA": (
        ReLoRA(of=AdaLoRA()),
        "ReLoRA decides what is trained of its update at each step, and so does AdaLoRA: keep one of them",
    ),
    "DyLoRA of VB-LoRA": (DyLoRA(of=VBLoRA()), "DyLoRA acts place by place, VBLoRA trains one tensor for all"),
    "ReLoRA with a bias": (ReLoRA(of=LoRA(bias=True)), "ReLoRA.* begins B A anew, not a bias: leave the bias"),
    "dropout inside": (lambda: DyLoRA(of=LoRA(dropout=0.1)), "give dropout to DyLoRA, not to LoRA.* inside it"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_compose_is_refused_with_the_reason(case: str) -> None:
    made, match = REFUSED[case]
    model = minilm()
    keys = list(model.state_dict())
    with pytest.raises(InlayError, match=match) as found:
        inlay.adapt(model, made() if callable(made) and not isinstance(made, Method) else made, ["attn.q"], head=None)
    if isinstance(made, list):
        assert isinstance(found.value, ComposeError)
    assert list(model.state_dict()) == keys


def test_a_stack_that_cannot_stand_is_refused_when_switching() -> None:
    model = minilm()
    inlay.adapt(model, LoRA(r=2), ["attn.q"], name="a", head=None)
    inlay.adapt(model, DoRA(), ["attn.q"], name="b", head=None)
    inlay.use(model, "b", "a")
    with pytest.raises(ComposeError, match=r"DoRA reads W .* must come first"):
        inlay.use(model, "a", "b")
    assert model.inlay.active == ["b", "a"]


def test_scaling_features_stands_on_an_update() -> None:
    """SSF acts on what a LoRA left, on every operation of a block."""
    base, model = opened()[0], minilm()
    adapter = inlay.adapt(model, [LoRA(r=4).on("attn.q"), SSF().on("block[0]")])
    close(output(model), output(base))
    losses = fit(model, adapter, 1e-2)
    assert losses[-1] < 0.9 * losses[0]
    trained = output(model)
    adapter.merge()
    close(output(model), trained)
