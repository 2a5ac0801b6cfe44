import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_task import make_data, make_model

from inlay.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its data, made once."""
    folder = tmp_path_factory.mktemp("tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_model(folder / "model")
    make_data(folder / "data")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process: (status, standard output, standard error)."""

    def command(*argv: object) -> tuple[int, str, str]:
        status = main([str(word) for word in argv])
        out = capsys.readouterr()
        return status, out.out, out.err

    return command
