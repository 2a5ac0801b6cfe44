"""Reading a command line: mistakes are one sentence, with near misses."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from inlay.core.errors import OptionError, near


class UsageError(OptionError):
    """A command line that cannot be read; `command` is as much of it as was understood."""

    def __init__(self, command: str, message: str) -> None:
        super().__init__(message)
        self.command = command


class Parser(argparse.ArgumentParser):
    """argparse's, with one sentence for an error instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError; a wrong choice names near misses."""
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            known = re.findall(r"[\w.-]+", choice[2])
            what = message.partition(":")[0].removeprefix("argument ")
            message = f"unknown {what} '{choice[1]}'{near(choice[1], known)} (known: {', '.join(known)})"
        elif message == "the following arguments are required: command":
            message = "say what to do; `inlay --help` lists the commands"
        raise UsageError(self.prog, message if self.prog == "inlay" else f"{message}; see `{self.prog} --help`")


Command = Callable[[str, object, str], Parser]
"""Enters a command: its name, the function that runs it, one line of help."""


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{text}'")
    return number


def as_json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="machine-readable output")


def add_set(p: argparse.ArgumentParser) -> None:
    p.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the method")
