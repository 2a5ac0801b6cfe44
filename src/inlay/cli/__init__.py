"""The command line: `inlay methods | plan | train | compare | evaluate | merge | export | inspect | models | data`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from inlay.core.errors import InlayError

EXIT_ERROR = 2


def parser() -> argparse.ArgumentParser:
    """The whole command line; recipe fields become flags of the commands that take them."""
    from inlay.cli import commands

    root = argparse.ArgumentParser(
        prog="inlay", description="Adapt frozen foundation models, compare methods, ship the result."
    )
    import inlay

    root.add_argument("--version", action="version", version=f"inlay {inlay.__version__}")
    sub = root.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], None], doc: str) -> argparse.ArgumentParser:
        p = sub.add_parser(name, help=doc, description=doc)
        p.set_defaults(run=run)
        return p

    commands.register(command)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors made on purpose are one clear line and exit status 2."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except InlayError as error:
        print(f"inlay {args.command}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"inlay {args.command}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return 0
