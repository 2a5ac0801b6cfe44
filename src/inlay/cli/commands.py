"""What each command does; the work itself is in the library."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from inlay.cli.flags import add_fields, assignments, given_fields, split_outside
from inlay.core.errors import InlayError, OptionError
from inlay.recipe import CompareRecipe, Recipe, load_recipe

Command = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]


def register(command: Command) -> None:
    """Enter every command."""
    p = command("methods", methods, "the catalogue: site, equation, paper, options")
    p.add_argument("name", nargs="?", help="one method, in full")
    as_json(p)

    p = command("plan", plan, "parameters, bytes and memory before anything is downloaded or trained")
    p.add_argument("recipe", nargs="?", help="recipe whose model and method to plan")
    p.add_argument("--arch", help="architecture by name (roberta-base, llama-7b, …) or a model folder")
    p.add_argument("--method", help="method, e.g. vera or 'dora(of=vera(r=256))'")
    p.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the method")
    p.add_argument("--where", help="places, comma-separated")
    p.add_argument("--layers", help="blocks, comma-separated")
    p.add_argument("--labels", type=int, default=2, help="classes of the task head (default 2)")
    p.add_argument("--batch", type=int, help="rows per training batch (default 32)")
    p.add_argument("--length", type=int, help="tokens per row (default 128)")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="type of the base")
    p.add_argument("--no-memory", action="store_true", help="counts alone")
    as_json(p)

    for name, run, cls, doc in (
        ("train", train, Recipe, "train one adapter; the same command again resumes it"),
        ("compare", compare, CompareRecipe, "many methods on one task: the table, the plots, the report"),
    ):
        p = command(name, run, doc)
        p.add_argument("recipe", nargs="?", help="recipe (YAML); flags replace its fields")
        p.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the method")
        add_fields(p, cls)
        as_json(p)

    p = command("evaluate", evaluate, "metrics of a saved adapter on its data set or another")
    p.add_argument("adapter", help="folder of a saved adapter")
    p.add_argument("--data", help="another data set than the one trained on")
    p.add_argument("--split", default="test", help="split (default test)")
    p.add_argument("--limit", type=int, help="rows to keep")
    p.add_argument("--batch", type=int, default=128, help="rows per forward pass (default 128)")
    p.add_argument("--generate", action="store_true", help="generate answers and compare them (language models)")
    as_json(p)

    p = command("merge", merge, "write base and adapter as one ordinary model, compared with the adapted one")
    p.add_argument("adapter", help="folder of a saved adapter")
    p.add_argument("--output", required=True, help="new folder")
    p.add_argument("--base", help="base model, where it is not the one the adapter names")
    as_json(p)

    p = command("export", export, "write an adapter in another format")
    p.add_argument("adapter", help="folder of a saved adapter")
    p.add_argument("--output", required=True, help="new folder")
    p.add_argument("--format", choices=["merged", "peft"], default="merged", help="a merged model, or a PEFT folder")
    p.add_argument("--base", help="base model, where it is not the one the adapter names")
    as_json(p)

    p = command("inspect", inspect, "what a saved adapter holds, checked against its digests")
    p.add_argument("adapter", help="folder of a saved adapter")
    as_json(p)

    p = command("models", models, "embedded models: list them, or fetch one")
    p.add_argument("action", nargs="?", choices=["list", "fetch"], default="list")
    p.add_argument("name", nargs="?")
    as_json(p)

    p = command("data", data, "embedded data sets: list, fetch, or preview samples as the model will see them")
    p.add_argument("action", nargs="?", choices=["list", "fetch", "preview"], default="list")
    p.add_argument("name", nargs="?", help="data set to fetch, or the recipe to preview")
    p.add_argument("--samples", type=int, default=3, help="samples to show (default 3)")
    add_fields(p, Recipe, skip=("method", "output"))
    as_json(p)


def as_json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="machine-readable output")


def show(args: argparse.Namespace, document: Any, render: Callable[[Console], None]) -> None:
    """Print as JSON or for people."""
    if args.json:
        print(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        render(Console())


def listing(title: str, columns: list[str], lines: list[list[str]]) -> Callable[[Console], None]:
    """A table renderer."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(*line)
    return lambda console: console.print(table)


# ---------------------------------------------------------------------- commands
def methods(args: argparse.Namespace) -> None:
    from inlay.catalogue import catalogue

    found = catalogue(args.name)
    if args.name is None:
        lines = [[m["name"], m["site"], m["equation"], m["paper"], "yes" if m["mergeable"] else "no"] for m in found]
        show(args, found, listing("", ["method", "site", "equation", "paper", "merges"], lines))
        return
    (m,) = found

    def page(console: Console) -> None:
        console.print(f"[bold]{m['class']}[/bold]  {m['site']} · {m['paper']}", highlight=False)
        console.print(m["equation"], m["description"], sep="\n\n", highlight=False, markup=False)
        places = ", ".join(m["where"]) or "every tensor it names"
        console.print(
            f"\nplaces: {places} · learning rate {m['learning_rate']:g} · merges: {m['mergeable']}", highlight=False
        )
        listing(
            "",
            ["option", "type", "default", ""],
            [[o["name"], o["type"], str(o["default"]), o["doc"]] for o in m["options"]],
        )(console)

    show(args, found, page)


def plan(args: argparse.Namespace) -> None:
    import torch

    from inlay.plan import plan as predict

    if args.recipe:
        recipe = load_recipe(args.recipe, Recipe)
        arch, chosen, where, layers = args.arch or recipe.model, recipe.placements(), recipe.where, recipe.layers
        batch, length = args.batch or recipe.batch, args.length or recipe.max_length or 128
    else:
        if not args.arch or not args.method:
            raise OptionError("plan needs a recipe, or --arch and --method")
        arch, chosen, layers = args.arch, with_options(args.method, args.set), None
        where = None
        batch, length = args.batch or 32, args.length or 128
    where = split_outside(args.where) if args.where else where
    layers = [int(n) for n in args.layers.split(",")] if args.layers else layers
    found = predict(
        arch, chosen, where, layers=layers, labels=args.labels, batch=batch, length=length,
        dtype=getattr(torch, args.dtype), memory=not args.no_memory,
    )  # fmt: skip
    lines = [[name.replace("_", " "), human(name, value)] for name, value in found.as_dict().items()]
    show(args, found.as_dict(), listing("", ["", ""], lines))


def with_options(method: str, pairs: list[str]) -> Any:
    """A method named on the command line, with the options of `--set`."""
    given = assignments(pairs)
    if not given:
        return method
    if "(" in method:
        raise OptionError("give options either in the call or with --set, not both")
    return {"method": method, **given}


def fields(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Recipe fields from flags, `--set` applied to the method."""
    given = given_fields(args, cls)
    if args.set:
        if cls is CompareRecipe:
            raise OptionError("--set is for one method: give options in the rows of the recipe")
        named = given.get("method", [])  # a flag that takes lists is read as one
        if len(named) != 1 or not isinstance(named[0], str):
            raise OptionError("--set gives options to --method: name one method there")
        given["method"] = with_options(named[0], args.set)
    return given


def train(args: argparse.Namespace) -> None:
    from inlay.train import Bar
    from inlay.train import train as run

    recipe = load_recipe(args.recipe, Recipe, fields(args, Recipe))
    trained = run(recipe, Bar(recipe.metric))
    document = {
        "output": str(trained.folder), "metrics": trained.metrics, "seconds": trained.seconds,
        "adapter_parameters": trained.adapter_parameters, "head_parameters": trained.head_parameters,
        "peak_memory_bytes": trained.peak_memory_bytes,
    }  # fmt: skip
    show(args, document, listing("", ["", ""], [[k.replace("_", " "), human(k, v)] for k, v in document.items()]))


def compare(args: argparse.Namespace) -> None:
    from inlay.compare import compare as run
    from inlay.report import rows, table

    recipe = load_recipe(args.recipe, CompareRecipe, fields(args, CompareRecipe))
    result = run(recipe)

    def render(console: Console) -> None:
        console.print(table(result, console.width))
        console.print(f"report: {Path(recipe.output) / 'report.html'}", highlight=False)

    show(args, rows(result), render)


def evaluate(args: argparse.Namespace) -> None:
    from inlay.evaluate import evaluate as run

    metrics = run(
        args.adapter, data=args.data, split=args.split, limit=args.limit, batch=args.batch, generate=args.generate
    )
    show(args, metrics, listing("", ["metric", "value"], [[name, f"{value:.4f}"] for name, value in metrics.items()]))


def open_adapted(folder: str, base: str | None) -> tuple[Any, Any]:
    """(opened base, adapter) of a saved adapter."""
    from inlay.evaluate import open_adapter

    return open_adapter(folder, base)


def merge(args: argparse.Namespace) -> None:
    args.format = "merged"
    export(args)


def export(args: argparse.Namespace) -> None:
    opened, adapter = open_adapted(args.adapter, args.base)
    if args.format == "peft":
        from inlay.interop.peft import write

        write(adapter, args.output)
        record: dict[str, Any] = {"format": "peft", "output": args.output}
    else:
        from inlay.core.export import export as run

        record = run(opened.model, args.output)
        if opened.processor is not None:
            opened.processor.save_pretrained(args.output)
    show(args, record, listing("", ["", ""], [[str(k), str(v)] for k, v in record.items()]))


def inspect(args: argparse.Namespace) -> None:
    from inlay.core.checkpoint import read

    document, tensors = read(args.adapter)
    lines = [[name, str(tuple(t.shape)), str(t.dtype).removeprefix("torch."), f"{float(t.float().norm()):.4g}"]
             for name, t in sorted(tensors.items())]  # fmt: skip
    facts = {k: v for k, v in document.items() if k != "sites"} | {"sites": len(document["sites"])}

    def render(console: Console) -> None:
        listing("", ["", ""], [[k, json.dumps(v, ensure_ascii=False)] for k, v in facts.items()])(console)
        listing("", ["tensor", "shape", "type", "norm"], lines)(console)

    show(args, document, render)


def models(args: argparse.Namespace) -> None:
    from inlay import models as library

    embedded(args, library.names(), library.fetch)


def data(args: argparse.Namespace) -> None:
    from inlay import data as library

    if args.action == "preview":
        preview(args)
    else:
        embedded(args, library.names(), library.fetch)


def embedded(args: argparse.Namespace, known: list[Any], fetch: Callable[[str], Any]) -> None:
    """List or fetch what is embedded."""
    if args.action == "fetch":
        if not args.name:
            raise OptionError("fetch needs a name, or 'all'")
        wanted = [e.name for e in known] if args.name == "all" else [args.name]
        got = {name: str(fetch(name)) for name in wanted}
        show(args, got, listing("", ["name", "at"], [[k, v] for k, v in got.items()]))
        return
    rows = [dataclasses.asdict(e) | {"fetched": e.fetched} for e in known]
    shown = [
        [e.name, e.task, human("bytes", e.archive.bytes), e.licence, f"{e.summary}. {e.caution or e.note}"]
        for e in known
    ]
    show(args, rows, listing("", ["name", "task", "download", "licence", "what"], shown))


def preview(args: argparse.Namespace) -> None:
    from inlay import data as library
    from inlay import models as opening

    given = given_fields(args, Recipe)
    if args.name and Path(args.name).suffix in (".yaml", ".yml"):
        known = load_recipe(args.name, Recipe, given)
    else:
        given.setdefault("data", args.name)
        if not given.get("data") or not given.get("model"):
            raise OptionError("preview needs a recipe, or a data set and --model")
        known = load_recipe({"method": "linearprobe"}, Recipe, given)
    loaded = library.load(known.data, columns=known.columns, task=known.task, limit=known.limit)
    opened = opening.open(known.model, loaded.task, labels=loaded.labels)
    prepared = library.prepare(
        loaded, opened.processor, max_length=known.max_length, image_size=known.image_size, template=known.template
    )
    samples = library.preview(loaded, prepared, args.samples)
    show(args, samples, lambda console: console.print(library.render_preview(samples)))


def human(name: str, value: Any) -> str:
    """A number as people read it: bytes in MB, counts with thousands separators."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {human(k, v)}" for k, v in value.items())
    if value is None:
        return "–"
    if "bytes" in name and isinstance(value, int):
        return f"{value / 1e6:,.2f} MB" if value >= 1e5 else f"{value / 1e3:,.1f} KB"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


__all__ = ["InlayError", "register"]
