"""`inlay methods`, `inlay models`, `inlay data`: what there is."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from inlay.archives import Embedded
from inlay.cli.arguments import Command, as_json, positive
from inlay.cli.flags import add_fields, given_fields
from inlay.cli.show import listing, show, size
from inlay.core.errors import OptionError, near
from inlay.recipe import Recipe, load_recipe, rows_at

SEEN = ("model", "data", "task", "columns", "limit", "max_length", "image_size", "template")
"""Recipe fields that decide what the model will see."""


def register(command: Command) -> None:
    p = command("methods", methods, "the catalogue: site, equation, paper, options")
    p.add_argument("name", nargs="?", help="one method, in full")
    as_json(p)

    p = command("models", models, "embedded models: list them, or fetch one")
    p.add_argument("action", nargs="?", choices=["list", "fetch"], default="list")
    p.add_argument("name", nargs="?", help="one of them; for fetch, 'all' is all of them")
    as_json(p)

    p = command("data", data, "embedded data sets: list, fetch, or preview samples as the model will see them")
    p.add_argument("action", nargs="?", choices=["list", "fetch", "preview"], default="list")
    p.add_argument("name", nargs="?", help="a data set; for fetch, 'all' is all of them; for preview, also a recipe")
    p.add_argument("--samples", type=positive, default=3, help="samples to show (default 3)")
    p.add_argument("--split", default="train", help="split to preview (default train)")
    add_fields(p, Recipe, SEEN)
    as_json(p)


def methods(args: argparse.Namespace) -> None:
    from inlay.catalogue import catalogue

    found = catalogue(args.name)
    if args.name is None:
        columns = ["method", "site", "equation", "paper", "merges"]
        lines = [[m["name"], m["site"], m["equation"], m["paper"], yes(m["mergeable"])] for m in found]
        show(args, found, listing(columns, lines))
        return
    (m,) = found

    def page(console: Console) -> None:
        console.print(f"[bold]{m['class']}[/bold]  {m['site']} · {m['paper']}\n", highlight=False)
        console.print(m["equation"], m["description"], sep="\n\n", highlight=False, markup=False)
        places = ", ".join(m["where"]) or "the whole model"
        line = f"\nplaces: {places} · learning rate {m['learning_rate']:g} · merges: {yes(m['mergeable'])}"
        console.print(line, highlight=False, markup=False)
        if m["options"]:
            console.print()
            lines = [[o["name"], o["type"], written(o["default"]), o["doc"]] for o in m["options"]]
            listing(["option", "type", "default", "meaning"], lines)(console)

    show(args, found, page)


def yes(value: bool) -> str:
    return "yes" if value else "no"


def written(default: Any) -> str:
    """A default as one writes it: `lora`, `'base'`, `[]`."""
    return default["method"] if isinstance(default, dict) and "method" in default else repr(default)


# ---------------------------------------------------------------------- models and data
def models(args: argparse.Namespace) -> None:
    from inlay import models as library

    embedded(args, library.names(), library.fetch, "model")


def data(args: argparse.Namespace) -> None:
    from inlay import data as library

    if args.action == "preview":
        preview(args)
        return
    given = given_fields(args, Recipe)
    if given:
        raise OptionError(
            f"--{next(iter(given)).replace('_', '-')} has no meaning here: it is for `inlay data preview`"
        )
    embedded(args, library.names(), library.fetch, "data set")


def embedded(args: argparse.Namespace, known: list[Embedded], fetch: Callable[[str], Path], kind: str) -> None:
    """List or fetch what is embedded."""
    by_name = {entry.name: entry for entry in known}
    if args.name is not None and args.name not in by_name and (args.name, args.action) != ("all", "fetch"):
        raise OptionError(f"no embedded {kind} '{args.name}'{near(args.name, by_name)} (known: {', '.join(by_name)})")
    if args.action == "fetch":
        if not args.name:
            raise OptionError("fetch needs a name, or 'all'")
        wanted = list(by_name) if args.name == "all" else [args.name]
        got = {name: str(fetch(name)) for name in wanted}
        show(args, got, listing(["name", "at"], [[name, at] for name, at in got.items()]))
        return
    chosen = known if args.name is None else [by_name[args.name]]
    rows = [dataclasses.asdict(e) | {"fetched": e.fetched} for e in chosen]
    shown = [
        [e.name, e.task, "here" if e.fetched else size(e.archive.bytes), e.licence,
         f"{e.summary}. {' '.join(text for text in (e.caution, e.note) if text)}"]
        for e in chosen
    ]  # fmt: skip
    show(args, rows, listing(["name", "task", "download", "licence", "what"], shown))


def preview(args: argparse.Namespace) -> None:
    from inlay import data as library
    from inlay import models as opening

    given = given_fields(args, Recipe)
    if args.name and Path(args.name).suffix in (".yaml", ".yml"):
        known = rows_at(args.name, given)[0].recipe
    else:
        given.setdefault("data", args.name)
        if not given.get("data") or not given.get("model"):
            raise OptionError("preview needs a recipe, or a data set and --model")
        known = load_recipe({"method": "linearprobe"}, Recipe, given)
    loaded = library.load(known.data, columns=known.columns, task=known.task, limit=known.limit)
    if args.split not in loaded.splits:
        raise OptionError(f"{loaded.name} has no split '{args.split}': {', '.join(loaded.splits)}")
    opened = opening.open(known.model, loaded.task, labels=loaded.labels)
    prepared = library.prepare(
        loaded, opened.processor, max_length=known.max_length, image_size=known.image_size, template=known.template
    )
    samples = library.preview(loaded, prepared, args.samples, args.split)
    counts = ", ".join(f"{len(rows):,} {split}" for split, rows in loaded.splits.items())

    def render(console: Console) -> None:
        console.print(library.render_preview(samples))
        notes = [f"{loaded.name}: {loaded.task}, {counts} rows.", loaded.note, prepared.note]
        console.print("\n".join(note for note in notes if note), style="dim", highlight=False, markup=False)

    show(args, samples, render)
