"""The suite catches what it is there to catch: broken methods, planted and thrown away."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from inlay.core import merge as merging
from inlay.core.errors import MergeError
from inlay.core.matrices import LowRank
from inlay.core.method import REGISTRY, DeltaMethod, HiddenMethod, Method
from inlay.core.sites import Site
from laws import checks
from laws.benches import benches
from laws.cases import Case
from laws.checks import Trial, trial
from laws.oracles import ORACLES


class Right(DeltaMethod):
    """W′ = W + B A."""

    kind: ClassVar[str] = "weight"

    def build(self, site: Site) -> None:
        self.A, self.B = nn.Parameter(torch.randn(2, site.d_in)), nn.Parameter(torch.zeros(site.d_out, 2))

    def count(self, site: Site) -> int:
        return 2 * (site.d_in + site.d_out)

    def delta(self) -> LowRank:
        return LowRank(self.B, self.A)


class Beside(HiddenMethod):
    """y′ = y + s."""

    def build(self, site: Site) -> None:
        self.s = nn.Parameter(torch.zeros(site.features))

    def count(self, site: Site) -> int:
        return site.features


def on(cls: type[Method], bench: str = "linear") -> Trial:
    return trial(Case(cls(), benches()[bench]))


@pytest.fixture(autouse=True)
def equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the planted matrix methods claim to compute."""
    for name in ("right", "wrongmerge"):
        monkeypatch.setitem(ORACLES, name, lambda W, b, g: (W + g["B"] @ g["A"], b))


def test_a_right_method_passes() -> None:
    t = on(Right)
    for check in (checks.check_identity, checks.check_count, checks.check_disabled, checks.check_merge,
                  checks.check_several, checks.check_copied):  # fmt: skip
        check(t)
    checks.check_training(t.case)


def test_wrong_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    class WrongMerge(Right):
        def weight(self, W: Tensor) -> Tensor:
            return W + 1.01 * self.delta().dense()

    t = on(WrongMerge)
    with pytest.raises(MergeError, match="differ by"):  # the library's own proof
        checks.check_merge(t)
    monkeypatch.setattr(merging, "TOLERANCE", dict.fromkeys(merging.TOLERANCE, float("inf")))
    with pytest.raises(AssertionError, match="rounded more"):  # and that of the suite
        checks.check_merge(on(WrongMerge))


def test_wrong_start() -> None:
    class WrongStart(Right):
        def build(self, site: Site) -> None:
            super().build(site)
            self.B.data += 1e-3

    with pytest.raises(AssertionError, match="the start"):
        checks.check_identity(on(WrongStart))


def test_wrong_declaration_of_the_start() -> None:
    class Pretending(Right):
        starts_at_base = False

    with pytest.raises(AssertionError, match="declared not to start"):
        checks.check_identity(on(Pretending))


def test_wrong_count() -> None:
    class WrongCount(Right):
        def count(self, site: Site) -> int:
            return 2 * site.d_in

    with pytest.raises(AssertionError, match="declared"):
        checks.check_count(on(WrongCount))


def test_dead_parameter() -> None:
    class Dead(Right):
        def build(self, site: Site) -> None:
            super().build(site)
            self.unused = nn.Parameter(torch.zeros(3))

    with pytest.raises(AssertionError, match="unused has no gradient"):
        checks.check_training(on(Dead).case)


def test_base_that_moves() -> None:
    class Leaking(Beside):
        def after(self, x: Tensor, y: Tensor) -> Tensor:
            self.site.module._parameters["weight"].data.mul_(1 + 1e-6)
            return y + self.s

    with pytest.raises(AssertionError, match=r"training: .* changed"):
        checks.check_training(on(Leaking).case)


def test_traces() -> None:
    class Trace(Beside):
        def build(self, site: Site) -> None:
            super().build(site)
            site.module.register_forward_hook(lambda module, args, y: y)

    t = on(Trace)
    with pytest.raises(AssertionError, match="hooks differ"):
        checks.check_detached(t)


def test_rows_that_mix() -> None:
    class Mixing(Beside):
        def after(self, x: Tensor, y: Tensor) -> Tensor:
            return y + self.s * y.mean(0, keepdim=True)

    with pytest.raises(AssertionError, match="row 0"):
        checks.check_several(on(Mixing))


def test_residue() -> None:
    class Counting(Beside):
        calls: ClassVar[int] = 0

        def after(self, x: Tensor, y: Tensor) -> Tensor:
            type(self).calls += 1
            return y + self.s * type(self).calls

    with pytest.raises(AssertionError, match="enabled again"):
        checks.check_disabled(on(Counting))


def test_nothing_planted_stays() -> None:
    assert not {"right", "beside", "wrongmerge", "wrongstart"} & set(REGISTRY)
