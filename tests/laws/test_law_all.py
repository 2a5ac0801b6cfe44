"""The laws over the registry: every method on every site type, in float32, bfloat16 and float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inlay.core.errors import ComposeError, SiteError
from laws.cases import Case, cases
from laws.checks import check_all
from laws.refusals import refused


def each(dtype: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in cases(dtype)])


@each(torch.float32)
def test_laws(case: Case, tmp_path: Path) -> None:
    obey(case, tmp_path)


@each(torch.bfloat16)
def test_laws_bfloat16(case: Case, tmp_path: Path) -> None:
    obey(case, tmp_path)


@each(torch.float64)
def test_laws_float64(case: Case, tmp_path: Path) -> None:
    obey(case, tmp_path)


def obey(case: Case, folder: Path) -> None:
    """All laws hold, or the method refuses the bench for a reason that is written down in `laws.refusals`."""
    reason = refused(case)
    if reason is not None:
        with pytest.raises((SiteError, ComposeError), match=reason):
            case.attach(case.model())
        return
    broken = check_all(case, folder)
    assert not broken, "\n".join(broken)
