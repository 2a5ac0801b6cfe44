"""The command line: `inlay methods | plan | train | compare | evaluate | merge | export | inspect | models | data`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from inlay.cli.arguments import Parser, UsageError
from inlay.core.errors import InlayError, OptionError, near

EXIT_ERROR = 2


def parser() -> Parser:
    """The whole command line; recipe fields become flags of the commands that take them."""
    import inlay
    from inlay.cli import library, plan, runs, saved

    root = Parser(
        prog="inlay",
        description="Adapt frozen foundation models, compare methods, ship the result.",
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"inlay {inlay.__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: object, doc: str) -> Parser:
        p: Parser = commands.add_parser(name, help=doc, description=doc, allow_abbrev=False)
        p.set_defaults(run=run, known=p)
        return p

    for part in (library, plan, runs, saved):
        part.register(command)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what a user can get wrong is one clear line and exit status 2."""
    name = "inlay"
    try:
        args, left = parser().parse_known_args(argv)
        name = f"inlay {args.command}"
        refuse(args.known, left)
        args.run(args)
        sys.stdout.flush()
    except UsageError as error:
        print(f"{error.command}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except InlayError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does: nobody misses the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # files and folders that cannot be read or written
        where = f"{error.filename}: " if error.filename else ""
        print(f"{name}: {where}{error.strerror or error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def refuse(known: Parser, left: list[str]) -> None:
    """OptionError about words that a command does not take."""
    if not left:
        return
    word = left[0].partition("=")[0]
    if not word.startswith("-"):
        raise OptionError(f"'{word}' is one word too many; see `{known.prog} --help`")
    flags = [flag for action in known._actions for flag in action.option_strings if flag.startswith("--")]
    raise OptionError(f"no option '{word}'{near(word, flags)} (its options: {', '.join(flags)})")
