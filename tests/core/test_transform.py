"""Maps of inputs and outputs, and the order in which methods that use them may stand at one module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inlay
from inlay.core.errors import ComposeError
from inlay.core.method import Method
from inlay.core.transform import Blocks, Map, Pairs, Product, Reflections, Scale
from inlay.methods import BOFT, OFT, SSF, ETHERPlus, Full, GLoRA, LoRA, RoAd
from inlay.methods.weight.boft import butterfly
from laws.cases import stir
from laws.checks import close, gap, output

D = torch.float64
ORDER = torch.randperm(12, generator=torch.Generator().manual_seed(0))
MAPS: list[Map] = [
    Scale(torch.randn(12, dtype=D)),
    Blocks(torch.randn(3, 4, 4, dtype=D)),
    Blocks(torch.randn(1, 4, 4, dtype=D)),
    Blocks(torch.randn(3, 4, 4, dtype=D), ORDER, ORDER.argsort()),
    Reflections((-2.0, torch.randn(3, 4, dtype=D)), (1.0, torch.randn(3, 4, dtype=D))),
    Pairs(torch.randn(12, dtype=D), torch.randn(12, dtype=D), 4),
    Pairs(torch.randn(8, dtype=D), torch.randn(8, dtype=D), 4),
]
MAPS.append(Product(*MAPS))


@pytest.mark.parametrize("m", MAPS, ids=lambda m: type(m).__name__)
def test_a_map_is_linear_and_its_transpose_is_that_of_its_matrix(m: Map) -> None:
    M = m.of(torch.eye(12, dtype=D)).T  # columns are what the unit vectors become
    x = torch.randn(2, 3, 12, dtype=D)
    torch.testing.assert_close(m.of(x), x @ M.T)
    torch.testing.assert_close(m.transposed().of(x), x @ M)


@pytest.mark.parametrize(("d", "b"), [(16, 4), (24, 2), (48, 6)])
def test_butterfly_orders_are_permutations_and_the_first_is_none(d: int, b: int) -> None:
    assert butterfly(d, b, 0).tolist() == list(range(d))
    for i in (1, 2):
        order = butterfly(d, b, i).tolist()
        assert sorted(order) == list(range(d))
        assert order[: b // 2] == list(range(b // 2))
        assert order[b // 2 : b] == list(range(b, b + b // 2))  # half blocks 0 and 2 are side by side


def convolved() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh()).eval().requires_grad_(False)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh()).eval().requires_grad_(False)


INPUTS = {convolved: torch.randn(2, 4, 7, 7), linear: torch.randn(2, 3, 8)}
STACKS: list[tuple[object, list[Method]]] = [
    (convolved, [OFT(block_size=4), OFT(block_size=6)]),
    (convolved, [OFT(block_size=4), LoRA(r=2)]),
    (convolved, [Full(), OFT(block_size=4)]),
    (convolved, [GLoRA(r=2), BOFT(block_size=2, factors=1), ETHERPlus(), RoAd(), SSF()]),
    (linear, [LoRA(r=2), OFT(block_size=4), LoRA(r=2)]),
    (linear, [SSF(), BOFT(block_size=2), SSF(), ETHERPlus(side="output")]),  # biases move under what leaves them alone
    (linear, [LoRA(r=2, bias=True), ETHERPlus(), RoAd()]),
]


@pytest.mark.parametrize(("make", "methods"), STACKS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_stacks_merge_to_what_they_compute(make, methods: list[Method]) -> None:
    model, inputs = make(), {"input": INPUTS[make]}
    base = output(model, inputs)
    adapter = inlay.adapt(model, methods, "0")
    stir(adapter)
    out = output(model, inputs)
    assert gap(base, out) > 1e-2
    adapter.merge()
    close(out, output(model, inputs), 1e-5, "merged against adapted")


@pytest.mark.parametrize("below", [LoRA(r=2), SSF(), RoAd()], ids=str)
def test_what_changes_a_convolutions_tensor_cannot_stand_on_what_acts_on_its_output(below: Method) -> None:
    with pytest.raises(ComposeError, match=r"OFT.*changes the tensor that '0' reads and .* must come first there"):
        inlay.adapt(convolved(), [below, OFT(block_size=4)], "0")
