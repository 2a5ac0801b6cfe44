"""Generated parts of hand-written pages: neutral names, recipe fields, pairs of methods."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import torch

import inlay
from inlay.core.anatomy_data import FAMILIES, STRUCTURES, Names, Spelling, Tower
from inlay.core.errors import ComposeError, InlayError
from inlay.core.method import REGISTRY, method_from
from inlay.core.options import Option, options
from inlay.recipe import CompareRecipe, Recipe, Settings

from .markdown import Notes, code, table
from .measure import output, relative
from .method_pages import shown, span
from .places import PLACES

LINEAR = PLACES[0]


# ---------------------------------------------------------------------- neutral names
def names_section() -> str:
    """How every known architecture spells the neutral names."""
    page = ""
    for types, towers in grouped():
        tables = "\n".join(tower_table(tower, several=len(towers) > 1) for tower in towers)
        page += folded(", ".join(types), tables)
    for structure in STRUCTURES:
        marks = ", ".join(f"{path or 'it'} is a {kind.__name__}" for path, kind in structure.marks.items())
        page += folded(
            f"{structure.architecture} (a block is known by this: {marks})", tower_table(structure.tower, False)
        )
    return page


def folded(summary: str, text: str) -> str:
    """A part of the page that unfolds on a click."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n</details>\n\n"


def grouped() -> Iterator[tuple[list[str], tuple[Tower, ...]]]:
    """Model types that have the same towers."""
    groups: dict[tuple[int, ...], tuple[list[str], tuple[Tower, ...]]] = {}
    for model_type, towers in FAMILIES.items():
        groups.setdefault(tuple(map(id, towers)), ([], towers))[0].append(model_type)
    yield from groups.values()


def tower_table(tower: Tower, several: bool) -> str:
    before = f"{tower.name}." if several else ""
    blocks = " or ".join(code(path) for path in each(tower.blocks) if path)
    parts = joined(tower.block, tower.finer)
    inside = [[code(f"{before}block[i].{name}"), spelled(s)] for name, s in parts.items()]
    once = [[code(f"{before}{name}"), spelled(s)] for name, s in joined(tower.once, tower.beside).items()]
    gathered = [
        [code(f"{before}{part}{'[i]' if part == 'block' else ''}.conv[j], .norm[j]"), "convolutions and norms in order"]
        for part in tower.gather
    ]
    whole = [[code(f"{before}block[i]"), f"one of {blocks}"]] if tower.whole and blocks else []
    return table(["name", "module"], [*whole, *inside, *gathered, *once])


def joined(*names: Names) -> dict[str, Spelling]:
    return {key: value for part in names for key, value in part.items()}


def each(spelling: Spelling) -> tuple[str, ...]:
    return (spelling,) if isinstance(spelling, str) else spelling


def spelled(spelling: Spelling) -> str:
    return " or ".join(dict.fromkeys(map(one_spelling, each(spelling))))


def one_spelling(text: str) -> str:
    """`a>b`, `a@p` and `a#rule` in words."""
    body, _, rule = text.partition("#")
    body, _, param = body.partition("@")
    entry, _, path = body.rpartition(">")
    shown_path = code(path) if path else "the module itself"
    words = f"from {code(entry)} to {shown_path}" if entry else shown_path
    if param:
        return f"{words}, {'its rows of ' if rule else ''}tensor {code(param)}"
    return words + (", its rows" if rule else "")


# ---------------------------------------------------------------------- recipes
def recipe_sections() -> dict[str, str]:
    """Fields of both kinds of recipe, what they share apart."""
    common = options(Settings)
    own = {cls: [o for o in options(cls).values() if o.name not in common] for cls in (Recipe, CompareRecipe)}
    return {
        "fields of train": field_table(own[Recipe]),
        "fields of compare": field_table(own[CompareRecipe]),
        "common fields": field_table(list(common.values())),
    }


def field_table(fields: list[Option]) -> str:
    rows = [[code(o.name), code(o.type_name), default(o), span(o), o.doc] for o in fields]
    return table(["field", "type", "default", "range", "meaning"], rows)


def default(o: Option) -> str:
    """A default as YAML writes it."""
    if o.default is dataclasses.MISSING:
        return "required"
    words = {None: "null", True: "true", False: "false"}
    plain = o.default is None or isinstance(o.default, bool)
    return code(words[o.default] if plain else re.sub(r"^'(.+)'$", r"\1", shown(o.default)))


# ---------------------------------------------------------------------- pairs
def pairs_section(methods: list[str]) -> str:
    """Every ordered pair at one linear layer: composes, or is refused and why."""
    notes = Notes()
    rows = [[code(a), *(pair(a, b, notes) for b in methods)] for a in methods]
    table_ = table(["first \\ then", *methods], rows)
    return f"{table_}\n{notes.listed()}"


def pair(first: str, second: str, notes: Notes) -> str:
    """✓ where the two act together (and merge, where both have a closed form), the reason otherwise."""
    model = LINEAR.model()
    try:
        adapter = inlay.adapt(model, [first, second], LINEAR.where)
    except ComposeError as error:
        return "– " + notes.mark(reason(error, first, second))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    out = output(model, LINEAR.feed())
    if all(REGISTRY[name].mergeable for name in (first, second)):
        adapter.merge()
        assert relative(out, output(model, LINEAR.feed())) < 1e-5, f"{first} then {second} merge to something else"
    return "✓"


def reason(error: InlayError, first: str, second: str) -> str:
    sentence = re.sub(r"'inner[\w.]*'", "*place*", str(error))
    if first == second:
        return sentence.replace(method_from(first).label(), "*the method*")
    for text, word in ((second, "*the second*"), (first, "*the first*")):
        sentence = sentence.replace(method_from(text).label(), word)
    return sentence
