"""`inlay evaluate`, `inlay inspect`, `inlay merge`, `inlay export`: what is done with a saved adapter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from inlay.cli.arguments import Command, Parser, as_json, positive
from inlay.cli.flags import add_fields, given_fields
from inlay.cli.show import facts, listing, show
from inlay.core.errors import OptionError
from inlay.recipe import Recipe


def register(command: Command) -> None:
    p = command("evaluate", evaluate, "metrics of a saved adapter on its data set or another")
    p.add_argument("adapter", help="folder of a saved adapter")
    p.add_argument("--data", help="another data set than the one trained on")
    p.add_argument("--split", default="test", help="split (default test)")
    p.add_argument("--limit", type=positive, help="rows to keep")
    p.add_argument("--batch", type=positive, default=128, help="rows per forward pass (default 128)")
    p.add_argument("--generate", action="store_true", help="generate answers and compare them (language models)")
    p.add_argument("--max-new-tokens", type=positive, default=256, help="length of generated answers (default 256)")
    add_base(p)
    add_fields(p, Recipe, ("columns",))
    as_json(p)

    p = command("merge", merge, "write base and adapter as one ordinary model, compared with the adapted one")
    p.add_argument("adapter", help="folder of a saved adapter")
    p.add_argument("--output", required=True, help="new folder")
    p.add_argument(
        "--requantise", action="store_true",
        help="keep a quantised base in few bits: each layer is rounded again and the error reported",
    )  # fmt: skip
    add_base(p)
    as_json(p)

    p = command("export", export, "write an adapter in another format")
    p.add_argument("adapter", help="folder of a saved adapter")
    p.add_argument("--output", required=True, help="new folder")
    p.add_argument("--format", choices=["merged", "peft"], default="merged", help="a merged model, or a PEFT folder")
    add_base(p)
    as_json(p)

    p = command("inspect", inspect, "what a saved adapter holds, or what a model loses when it is quantised")
    p.add_argument("adapter", help="folder of a saved adapter, checked against its digests; with --quantize, a model")
    add_fields(p, Recipe, ("quantize", "quantize_group"))
    as_json(p)


def add_base(p: Parser) -> None:
    p.add_argument("--base", help="base model, where it is not the one the adapter names")
    p.add_argument("--any-base", action="store_true", help="accept a base with other weights than those of training")


def evaluate(args: argparse.Namespace) -> None:
    from inlay.evaluate import evaluate as run

    metrics = run(
        args.adapter, data=args.data, split=args.split, limit=args.limit, batch=args.batch, generate=args.generate,
        max_new_tokens=args.max_new_tokens, base=args.base, any_base=args.any_base,
        **given_fields(args, Recipe),
    )  # fmt: skip
    lines = [[name, f"{value:.4f}"] for name, value in metrics.items()]
    show(args, metrics, listing(["metric", "value"], lines, right=("value",)))


def merge(args: argparse.Namespace) -> None:
    args.format = "few bits" if args.requantise else "merged"
    export(args)


def export(args: argparse.Namespace) -> None:
    from inlay.evaluate.run import adapted

    output = Path(args.output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OptionError(f"{output} exists and is not an empty folder: choose another one")
    found = adapted(args.adapter, args.base, args.any_base)
    record: dict[str, Any] = {"output": args.output, "format": args.format}
    if args.format == "peft":
        from inlay.interop.peft import write

        assert found.adapter is not None
        write(found.adapter, output)
    else:
        from inlay.shipping import write_few_bits, write_merged

        record |= (write_few_bits if args.format == "few bits" else write_merged)(found, output)
    shown = {k: f"{v:.1e}" if isinstance(v, float) else v for k, v in record.items() if not isinstance(v, dict | list)}
    show(args, record, facts(shown))


def inspect(args: argparse.Namespace) -> None:
    from inlay.core.checkpoint import read

    given = given_fields(args, Recipe)
    if given:
        inspect_grids(args, given.get("quantize"), given.get("quantize_group"))
        return

    document, tensors = read(args.adapter)
    lines = [[name, str(tuple(t.shape)), str(t.dtype).removeprefix("torch."), f"{float(t.float().norm()):.4g}"]
             for name, t in sorted(tensors.items())]  # fmt: skip
    known = {k: v for k, v in document.items() if k != "sites"} | {"sites": len(document["sites"])}

    def render(console: Console) -> None:
        facts({k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in known.items()})(console)
        console.print()
        listing(["tensor", "shape", "type", "norm"], lines, right=("norm",))(console)

    show(args, document, render)


def inspect_grids(args: argparse.Namespace, kind: str | None, group: int | None) -> None:
    """Clipping against rounding error of every layer, on the widest grid and on the one that is used."""
    from inlay.models import open as open_model
    from inlay.models.rounding import Rounding, rounding

    if kind is None:
        raise OptionError("say how the model would be stored: --quantize int4, int8 or nf4")
    opened = open_model(args.adapter)
    found = rounding(opened.model, kind, opened.head, group)
    lines = [
        [r.path, *(f"{1e3 * x:.3f}" for x in r.widest), f"{r.clip:.3f}", *(f"{1e3 * x:.3f}" for x in r.used),
         f"{r.relative:.4f}"]
        for r in (*found, Rounding.total(found))
    ]  # fmt: skip
    columns = ["layer", "clipped", "rounded", "range", "clipped ", "rounded ", "error"]

    def render(console: Console) -> None:
        listing(columns, lines, right=tuple(columns[1:]))(console)
        console.print(
            "\nSquared errors in thousandths of ‖W‖²: on the grid from the smallest to the largest number, then on the "
            "one that is used, whose range is that share of it. error: ‖W − Ŵ‖ / ‖W‖ as used."
        )

    show(args, [r.as_dict() for r in found], render)
