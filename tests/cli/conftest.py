from collections.abc import Callable

import pytest

from inlay.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process: (status, standard output, standard error)."""

    def command(*argv: object) -> tuple[int, str, str]:
        status = main([str(word) for word in argv])
        out = capsys.readouterr()
        return status, out.out, out.err

    return command
