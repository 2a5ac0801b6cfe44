"""One page per method, and their index."""

from __future__ import annotations

import inspect
from typing import Any

from inlay.catalogue import describe
from inlay.core.companion import Companion
from inlay.core.contexts import ContextMethod
from inlay.core.method import (
    REGISTRY,
    AttentionMethod,
    InsertedMethod,
    Method,
    PixelMethod,
    SideAttentionMethod,
    method_class,
)
from inlay.core.options import Option, options
from inlay.core.statistics import Calibrated

from .counts import ARCHITECTURES, Count, counted_on
from .markdown import HEADER, Notes, code, linked, table
from .measure import Cell, takes

OF_DECODERS = AttentionMethod, SideAttentionMethod
"""Families that no encoder can take."""
KINDS = {
    "input": "what goes into the model: pixels",
    "tokens": "the token sequence, keys and values",
    "hidden": "activations that enter or leave a module",
    "weight": "frozen tensors",
    "gradient": "gradients and the optimiser's state",
    "schedule": "the course of training",
    "output": "logits or features",
}
"""What a method of each kind acts on, in the order in which data pass."""

ON_IMAGES = (InsertedMethod, PixelMethod)
"""Families of methods that are for images alone."""
Counts = dict[str, dict[str, Count]]

SNIPPET = """\
import torch
from transformers import BertConfig, BertForSequenceClassification

import inlay
from inlay.methods import {imports}
{quantise}
config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
model = BertForSequenceClassification(config)  # a small random one; any pretrained model goes here
{stored}adapter = inlay.adapt(model, {call})
print(adapter)

optimizer = inlay.optimizer(adapter)  # AdamW at the method's own rate
ids, labels = torch.randint(100, (8, 16)), torch.randint(2, (8,))
{start}for k in range(3):
    loss = model(input_ids=ids, labels=labels).loss + inlay.penalty(model)
    loss.backward()
    optimizer.step()
{step}    optimizer.zero_grad()

adapter.save("adapter")
"""
START = 'inlay.calibrate(model, [{"input_ids": ids, "labels": labels}])  # in earnest several batches of real data\n'
START_DECODER = START.replace('"labels": labels', '"labels": ids')
DECODER = """\
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.methods import {imports}

config = LlamaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
model = LlamaForCausalLM(config)  # a small random one; any pretrained model goes here
adapter = inlay.adapt(model, {call})
print(adapter)

optimizer = inlay.optimizer(adapter)  # AdamW at the method's own rate
ids = torch.randint(100, (2, 64))
{start}model.train()
for k in range(3):
    loss = model(input_ids=ids, labels=ids).loss + inlay.penalty(model)
    loss.backward()
    optimizer.step()
{step}    optimizer.zero_grad()

adapter.save("adapter")
"""
"""The same for methods that are for decoders alone."""
IMAGES = """\
import torch
from transformers import ViTConfig, ViTForImageClassification

import inlay
from inlay.methods import {imports}

config = ViTConfig(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
model = ViTForImageClassification(config)  # a small random one; any pretrained model goes here
adapter = inlay.adapt(model, {call})
print(adapter)

optimizer = inlay.optimizer(adapter)  # AdamW at the method's own rate
images, labels = torch.randn(8, 3, 32, 32), torch.randint(2, (8,))
model.train()
for k in range(3):
    loss = model(pixel_values=images, labels=labels).loss + inlay.penalty(model)
    loss.backward()
    optimizer.step()
{step}    optimizer.zero_grad()

adapter.save("adapter")
"""
"""The same for methods that are for images alone."""
DUAL = """\
import torch
from transformers import CLIPConfig, CLIPModel

import inlay
from inlay.methods import {imports}

small = {{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}}
text = {{**small, "vocab_size": 100, "max_position_embeddings": 32, "eos_token_id": 99, "bos_token_id": 1}}
vision = {{**small, "image_size": 16, "patch_size": 8}}
model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))  # random; any pretrained one goes here
# with real prompts: {name}(…).with_prompt("a photo of a {{}}.", tokenizer)
adapter = inlay.adapt(model, {call})
print(adapter)

optimizer = inlay.optimizer(adapter)  # AdamW at the method's own rate
images, labels = torch.randn(4, 3, 16, 16), torch.randint(5, (4,))
prompts = torch.cat([torch.randint(2, 99, (5, 6)), torch.full((5, 1), 99)], 1)  # those of five classes
model.train()
for k in range(3):
    out = model(pixel_values=images, input_ids=prompts, attention_mask=torch.ones_like(prompts))
    torch.nn.functional.cross_entropy(out.logits_per_image, labels).backward()
    optimizer.step()
{step}    optimizer.zero_grad()

adapter.save("adapter")
"""
"""The same for methods that fill class prompts."""
CONFIG = "(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)"
OTHERS = {"mamba": "(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=8)"}
"""What stands in the place of that configuration for methods of one architecture."""
FITTED = """\
from inlay.recipe import Recipe
from inlay.train import train

recipe = Recipe(
    model="minilm",
    data="trec",
    method="{plain}",
    limit={{"train": 200, "validation": 20, "test": 50}},
    base_dropout=False,
    output="adapter",
)
trained = train(recipe)  # fitted to the features of the training rows, nothing is trained by steps
print(trained.metrics)
"""
"""The same for methods that are fitted at once."""
CHOICES = """\
ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])  # a question of three tokens, its right answer and a wrong one
labels = torch.tensor([[-100, -100, -100, 8], [-100, -100, -100, -100]])
choices = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1]])  # which tokens answer question 1
"""
"""Batches for methods that compare answers."""
VIT = """(
    image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)"""
CONVOLUTIONS = {
    "ViT": "ResNet",
    VIT: '(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)',
}
"""What makes the snippet for images one for networks of convolutions."""
STEP = "    inlay.step(model, (k + 1) / 3, optimizer)  # what the method does between steps\n"
STORED = 'quantise(model, "{kind}", head=["classifier"])\n'
PROBE = "    inlay.step(model, (k + 1) / 3, optimizer, lambda: model(input_ids=ids, labels=labels).loss)\n"
MERGED = "adapter.merge()  # the network is an ordinary one again; adapter.unmerge() takes it back\n"


def method_page(name: str, counts: Counts, row: dict[str, Cell]) -> str:
    """The page of one method; `counts` by architecture and method, `row` is its row of the support matrix."""
    cls = method_class(name)
    about = describe(cls)
    places = ", ".join(code(w) for w in cls.where) or "the whole model"
    taken = [place for place, cell in row.items() if "attach" in cell.works]
    facts = [
        ["acts on", KINDS[cls.kind]],
        ["paper", linked(cls.paper)],
        ["default places", places],
        ["learning rate", f"{cls.learning_rate:g}"],
        ["merges", "yes" if cls.mergeable else "no"],
        ["attaches to", ", ".join(taken) or ("other methods" if issubclass(cls, Companion) else "the task head alone")],
        ["PEFT counterpart", ", ".join(dict.fromkeys(cell.peft for cell in row.values() if cell.peft)) or "none"],
    ]
    page = f"{HEADER}# {cls.__name__}\n\n> {cls.equation()}\n\n{table(['', ''], facts)}\n"
    page += linked(about["description"]) + "\n"
    page += "\nWhat works at which kind of place: [support](../support.md).\n"
    if issubclass(cls, Calibrated):
        page += "\nHow it comes to see data: [calibration](../calibration.md).\n"
    page += shared_text(cls) + option_table(cls) + composes(cls) + size(name, counts)
    page += "\n## In Python\n\n```python\n" + snippet(cls) + "```\n"
    return page + "\n## On the command line\n\n" + command_lines(cls, counts)


def shared_text(cls: type[Method]) -> str:
    """What an abstract class of `inlay.methods` says about all its methods."""
    page = ""
    for base in cls.__mro__[1:]:
        if base.__module__.startswith("inlay.methods") and inspect.isabstract(base):
            equation, _, text = (inspect.getdoc(base) or "").partition("\n")
            page += f"\nShared with {', '.join(siblings(base, cls))}:\n\n> {equation}\n\n{linked(text.strip())}\n"
    return page


def siblings(base: type, cls: type[Method]) -> list[str]:
    found = [c for _, c in sorted(REGISTRY.items()) if issubclass(c, base) and c is not cls]
    return [f"[{c.__name__}]({c.name()}.md)" for c in found]


def option_table(cls: type[Method]) -> str:
    found = options(cls)
    if not found:
        return "\n## Options\n\nNone.\n"
    rows = [[code(o.name), code(o.type_name), code(shown(o.default)), span(o), o.doc] for o in found.values()]
    return "\n## Options\n\n" + table(["option", "type", "default", "range", "meaning"], rows)


def shown(value: Any) -> str:
    return f"{type(value).__name__}()" if isinstance(value, Method) else repr(value)


def span(o: Option) -> str:
    """The range of an option in words."""
    if o.low is not None and o.high is not None:
        return f"{o.low:g} to {o.high:g}"
    return f"at least {o.low:g}" if o.low is not None else f"at most {o.high:g}" if o.high is not None else ""


def composes(cls: type[Method]) -> str:
    """Which methods it takes as an option, and which take it."""
    lines = []
    for o in options(cls).values():
        if isinstance(o.default, Method):
            fits = [(n, c) for n, c in sorted(REGISTRY.items()) if takes(cls, o, c)]
            listed = ", ".join(f"[`{o.name}={c.__name__}()`]({n}.md)" for n, c in fits)
            lines.append(f"`{o.name}` takes any method with a structured update: {listed}.")
    for _, other in sorted(REGISTRY.items()):
        for o in options(other).values():
            if isinstance(o.default, Method) and takes(other, o, cls):
                call = f"`{other.__name__}({o.name}={cls.__name__}())`"
                lines.append(f"Fits into [{other.__name__}]({other.name()}.md): {call}.")
    return "\n## Made of methods\n\n" + "\n\n".join(lines) + "\n" if lines else ""


def size(name: str, counts: Counts) -> str:
    """Trained parameters on known architectures, with defaults, and of what it is made of."""
    notes, rows = Notes(), []
    formula = " ".join((method_class(name).count.__doc__ or "").split())
    architectures = counted_on(method_class(name))
    for text in [text for text in counts[architectures[0]] if text.partition("(")[0] == name]:
        for arch in architectures:
            c = counts[arch][text]
            numbers = ["–", "–", "– " + notes.mark(c.refused)] if c.refused else [
                f"{c.sites:,}", f"{c.adapter:,}", f"{100 * c.adapter / (c.base - c.head):.3f} %",
            ]  # fmt: skip
            rows.append([code(text), arch, *numbers])
    page = "\n## Size\n\nTrained parameters with defaults; the task head is counted neither there nor in the base."
    page += f" At one site: {formula}" if formula else ""
    page += "\n\n" + table(["method", "architecture", "sites", "parameters", "of the base"], rows)
    return page + ("\n" + notes.listed() if notes.texts else "")


# ---------------------------------------------------------------------- code
def first_option(cls: type[Method]) -> Option | None:
    """The option to show: the first whole number, else the first plain one that the class itself declares."""
    found, own = list(options(cls).values()), inspect.get_annotations(cls)
    plain = [o for o in found if o.name in own and (o.type in (float, bool) or isinstance(o.default, Method))]
    return next(iter([o for o in found if o.type is int] + plain), None)


def snippet(cls: type[Method]) -> str:
    o = first_option(cls)
    imports = {cls.__name__, *([type(o.default).__name__] if o and isinstance(o.default, Method) else [])}
    call = f"{cls.__name__}({o.name}={shown(o.default)})" if o else f"{cls.__name__}()"
    if issubclass(cls, Companion):
        imports, call = imports | {"LoRA"}, f"[LoRA(), {call}]"
    step = PROBE if cls.probe is not Method.probe else STEP if cls.step is not Method.step else ""
    families = {OF_DECODERS: DECODER, ContextMethod: DUAL, ON_IMAGES: IMAGES}
    text = next((text for family, text in families.items() if issubclass(cls, family)), SNIPPET)
    if cls.architecture:
        text = DECODER.replace(CONFIG, OTHERS[cls.architecture]).replace("Llama", cls.architecture.capitalize())
    elif cls.where == ("conv",):
        text = IMAGES
        for before, after in CONVOLUTIONS.items():
            text = text.replace(before, after)
    elif cls.answers:
        text = FITTED
    elif issubclass(cls, Companion) and cls.added is not Companion.added:
        text = DECODER.replace("ids = torch.randint(100, (2, 64))\n", CHOICES)
        text = text.replace("labels=ids)", "labels=labels, choices=choices)")
    text = text.format(name=cls.__name__, plain=call.lower(), imports=", ".join(sorted(imports)), call=call, step=step,
                       start=(START if text is SNIPPET else START_DECODER) if issubclass(cls, Calibrated) else "",
                       quantise="from inlay.models.quantise import quantise\n" if cls.needs else "",
                       stored=STORED.format(kind=cls.needs) if cls.needs else "")  # fmt: skip
    return text + (MERGED if cls.mergeable else "")


def command_lines(cls: type[Method], counts: Counts) -> str:
    """Commands that are run where they are cheap."""
    o = first_option(cls)
    chosen, method = "", cls.name()
    if o is not None:
        value = o.default.name() if isinstance(o.default, Method) else str(o.default).lower()
        chosen = f" --set {o.name}={value}"
    if issubclass(cls, Companion):
        chosen, method = "", f'"[lora, {cls.name()}]"'
    arch = next(a for a in counted_on(cls) if not counts[a][cls.name()].refused)
    chosen += f" --quantize {cls.needs}" if cls.needs else ""
    what = "minilm --data trec"
    if cls.architecture == "mamba":
        what = "state-spaces/mamba-130m-hf --data gutenberg"
    elif issubclass(cls, OF_DECODERS):
        what = "smollm2-135m-instruct --data gutenberg"
    elif issubclass(cls, ContextMethod):
        what = "lit-dinov2-small --data cifar10 --prompt 'a photo of a {}.'"
    elif issubclass(cls, ON_IMAGES):
        what = "dinov2-small --data cifar10 --image-size 70"
    train = f"inlay train --model {what} --method {method}{chosen} --output runs/{cls.name()}"
    return (
        f"```bash\ninlay plan --arch {arch} --method {method}{chosen} --no-memory\ninlay inspect adapter\n```\n\n"
        f"<!-- not run: fetches a model and a data set -->\n```bash\n{train}\n```\n"
    )


# ---------------------------------------------------------------------- index
def index(counts: Counts) -> str:
    page = HEADER + (
        "# Methods\n\nBy what they act on. Sizes are trained parameters on roberta-base with defaults, no head.\n"
        "What works at which kind of place: [support](../support.md).\n"
    )
    for kind, what in KINDS.items():
        found = [cls for _, cls in sorted(REGISTRY.items()) if cls.kind == kind]
        if not found:
            continue
        rows = [
            [f"[{cls.__name__}]({cls.name()}.md)", cls.equation(), linked(cls.paper), size_of(counts, cls),
             "yes" if cls.mergeable else "no"]
            for cls in found
        ]  # fmt: skip
        page += f"\n## {kind}: {what}\n\n" + table(["method", "equation", "paper", "parameters", "merges"], rows)
    return page


def size_of(counts: Counts, cls: type[Method]) -> str:
    if cls.architecture:
        return "–"
    c = counts[ARCHITECTURES[0]][cls.name()]
    return "–" if c.refused else f"{c.adapter:,}"
