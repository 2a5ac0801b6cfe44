"""What a training step costs over its floor, beside `peft`, method by method.

    python benchmarks/step.py                                      # every case, in float32; hours on a CPU
    python benchmarks/step.py --model minilm --where qv --rounds 9 lora vera

The floor of a step is the frozen model's forward pass and the backward pass that carries gradients of activations, and
none of weights, down to what the lowest adapted module puts out. Overhead = step / floor, both of the same round: a
round times the floor, inlay's and peft's step one after the other on the same batch, and the median over rounds counts.
Saved bytes are the storages that autograd keeps of the forward, parameters apart. Steps are forward and backward,
without the optimizer, dropout off, on random weights (time does not depend on them).

Rows go to `results/step/<device>.csv`, one at a time; those that are there are not measured again (`--again` does).
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import base_model, quiet, read, seconds, write
from peft_twins import twin
from torch import Tensor, nn

import inlay
from inlay.architectures import configuration
from inlay.compare.run import machine
from inlay.core.adapter import Adapter
from inlay.core.errors import InlayError
from inlay.core.files import write_text
from inlay.core.method import REGISTRY, TokenMethod, method_from
from inlay.plan import example
from inlay.train.measure import saved_for_backward

RESULTS = Path(__file__).resolve().parent.parent / "results" / "step"
MODELS = {"minilm": (32, 128), "smollm2-135m-instruct": (4, 256), "vit-base": (8, 224)}
"""Rows of a batch, and tokens per row or side of an image in pixels."""
PLACES = {"qv": ["attn.q", "attn.v"], "all": ["all-linear"]}
SIZED = {
    "qv": ["lora(r=8)", "vera(r=256)"],
    "all": ["lora(r=16)", "lora(r=64)", "dora(of=lora(r=16))", "loha(r=8)", "lokr(r=8)", "oft(block_size=32)"],
}
"""Cases of a stated size, besides every method at its defaults."""
APART = {"full", "linearprobe", "galore", "ist", "longlora", "peqa"}
"""Methods that train the base's own tensors, govern others, or need another base."""


@dataclass(frozen=True)
class Row:
    """One method of one library on one model; times in seconds, memory in bytes."""

    model: str
    where: str
    dtype: str
    batch: int
    length: int
    """Tokens per row, or side of an image in pixels."""
    method: str
    library: str
    overhead: float | None
    """Median over rounds of step / floor."""
    lower: float | None
    upper: float | None
    """Quartiles of the same."""
    floor_seconds: float | None
    saved_bytes: int | None
    floor_saved_bytes: int | None
    trained: int | None
    rounds: int
    refused: str = ""

    @property
    def case(self) -> tuple[Any, ...]:
        return self.model, self.where, self.dtype, self.batch, self.length

    @property
    def key(self) -> tuple[Any, ...]:
        return *self.case, self.method, self.library


# ---------------------------------------------------------------------- one step
Step = Callable[[], Tensor]


def prepared(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    """The loss of the batch."""

    def forward() -> Tensor:
        return model(**batch).loss

    return forward


@contextmanager
def floor(model: nn.Module, adapted: list[nn.Module], forward: Step) -> Iterator[None]:
    """Gradients of activations flow down to what the first adapted modules put out, and no further.

    The first are those that are given the same tensor as the one that runs first (query and value).
    """
    ran: list[tuple[nn.Module, Any]] = []
    spies = [
        m.register_forward_pre_hook(lambda m, args, kwargs: ran.append((m, next(iter((*args, *kwargs.values()))))),
                                    with_kwargs=True)
        for m in adapted
    ]  # fmt: skip
    with torch.no_grad():
        forward()
    for spy in spies:
        spy.remove()
    lowest = list(dict.fromkeys(m for m, x in ran if x is ran[0][1]))

    def leaf(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y.detach().requires_grad_()

    handles = [m.register_forward_hook(leaf) for m in lowest]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def step(forward: Step, model: nn.Module) -> None:
    """One forward and backward pass."""
    forward().backward()
    model.zero_grad(set_to_none=True)


def saved(forward: Step, model: nn.Module) -> int:
    return saved_for_backward(forward, model)[1]


# ---------------------------------------------------------------------- one case
def measure(args: argparse.Namespace, name: str, where: str, spec: str) -> list[Row]:
    """Both libraries' rows of a case; a method that has no place there is a row that says why."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rows, length = sized(args, name)
    config, task, _ = configuration(name)
    base = quiet(base_model(name, dtype)).to(device)
    batch = {k: t.to(device) for k, t in example(config, task, rows, length).items()}
    batch = {k: t.to(dtype) if t.is_floating_point() and k != "labels" else t for k, t in batch.items()}
    about: dict[str, Any] = {"model": name, "where": where, "dtype": args.dtype, "batch": rows, "length": length}
    about["method"] = spec
    method = method_from(spec)
    places = None if isinstance(method, TokenMethod) or method.where == () else PLACES[where]
    own = copy.deepcopy(base)
    try:
        adapter = inlay.adapt(own, method, places, head=None)
    except InlayError as error:
        return [Row(**about, library="inlay", **dict.fromkeys(NUMBERS), rounds=0, refused=" ".join(str(error).split()))]
    runs = {"inlay": own}
    paths = paths_of(adapter)
    if (other := twin(method, copy.deepcopy(base), paths)) is not None:
        runs["peft"] = quiet(other)
    base.requires_grad_(False)
    modules = dict(base.named_modules())
    adapted = [modules[path] for path in paths] or [base.get_input_embeddings()]
    forward = prepared(base, batch)
    steps = {library: prepared(model, batch) for library, model in runs.items()}
    with floor(base, adapted, forward):
        floor_saved = saved(forward, base)
        kept = {library: saved(step, runs[library]) for library, step in steps.items()}
        times: dict[str, list[float]] = {library: [] for library in ("floor", *steps)}
        for turn in range(args.rounds + 1):
            order = ["floor", *steps] if turn % 2 else [*reversed(steps), "floor"]
            for library in order:
                model = base if library == "floor" else runs[library]
                one = forward if library == "floor" else steps[library]
                taken = seconds(lambda one=one, model=model: step(one, model), device)
                times[library] += [taken] if turn else []  # the first round warms up
    found = []
    for library, model in runs.items():
        ratios = sorted(t / f for t, f in zip(times[library], times["floor"], strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found.append(Row(**about, library=library, overhead=middle, lower=low, upper=high,
                         floor_seconds=statistics.median(times["floor"]), saved_bytes=kept[library],
                         floor_saved_bytes=floor_saved, trained=trained, rounds=args.rounds))  # fmt: skip
    return found


def sized(args: argparse.Namespace, name: str) -> tuple[int, int]:
    """Rows of a batch and their length."""
    rows, length = MODELS[name]
    return args.batch or rows, args.length or length


NUMBERS = ("overhead", "lower", "upper", "floor_seconds", "saved_bytes", "floor_saved_bytes", "trained")


def paths_of(adapter: Adapter) -> list[str]:
    """Paths of the adapted modules; none for methods on the token sequence."""
    return list(dict.fromkeys(level.site.path for level in adapter.levels if level.site.tower is None))


# ---------------------------------------------------------------------- all of them
def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    file = RESULTS / f"{args.device.partition(':')[0]}.csv"
    done = {row.key: row for row in read(file, Row)}
    for name in args.model:
        for where in args.where:
            for spec in args.methods or [*SIZED[where], *(m for m in sorted(REGISTRY) if m not in APART)]:
                if (name, where, args.dtype, *sized(args, name), spec, "inlay") in done and not args.again:
                    continue
                for row in measure(args, name, where, spec):
                    done[row.key] = row
                    print(told(row), flush=True)
                write(file, list(done.values()))
                gc.collect()
    about = ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None)
    about = f"{about}. {args.note}" if args.note else about
    write_text(RESULTS / "README.md", page(list(done.values()), about, args.threads))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("methods", nargs="*", help="specifications such as 'lora(r=8)' (default: every case)")
    parser.add_argument("--model", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--where", nargs="*", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, help="rows, instead of the model's own")
    parser.add_argument("--length", type=int, help="tokens or pixels, instead of the model's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="", help="said on the page, about the machine")
    parser.add_argument("--again", action="store_true", help="measure rows that are there again")
    return parser.parse_args()


def told(row: Row) -> str:
    if row.overhead is None or row.saved_bytes is None:
        return f"{' '.join(map(str, row.key))}: {row.refused}"
    return f"{' '.join(map(str, row.key))}: {row.overhead:.3f} of the floor, {row.saved_bytes / 1e6:.0f} MB saved"


def page(rows: list[Row], about: str, threads: int) -> str:
    """A table per model, place and type: both libraries, and inlay's excess over the floor as a share of peft's."""
    parts = [
        "# A training step over its floor\n\nMade by `python benchmarks/step.py`; what is measured and how is said at "
        f"the top of that file. {threads} thread{'s' if threads > 1 else ''}; {about}.\n"
    ]
    for case in dict.fromkeys(row.case for row in rows):
        here = [row for row in rows if row.case == case and row.overhead is not None]
        if not here:
            continue
        first = here[0]
        heading = f"{first.model}, {first.batch} × {first.length}, {first.where}, {first.dtype}"
        parts.append(
            f"\n## {heading}\n\n"
            f"Floor: {first.floor_seconds:.2f} s, {(first.floor_saved_bytes or 0) / 1e6:.0f} MB saved.\n\n"
            "| Method | Trained | inlay | peft | Excess ÷ peft's | Saved MB | peft's |\n|:--|--:|--:|--:|--:|--:|--:|\n"
        )
        theirs = {row.method: row for row in here if row.library == "peft"}
        parts += [line(row, theirs.get(row.method)) for row in here if row.library == "inlay"]
        parts.append(
            missed([(row, theirs[row.method]) for row in here if row.library == "inlay" and row.method in theirs])
        )
    return "".join(parts)


def missed(pairs: list[tuple[Row, Row]]) -> str:
    """Which methods are not where they are meant to be: at most 40 % of peft's excess, and its saved bytes + 5 %."""
    slow = [f"{own.method} ({share(own, other):.0%})" for own, other in pairs if share(own, other) > 0.4]
    large = [f"{own.method} (× {(own.saved_bytes or 0) / (other.saved_bytes or 1):.2f})" for own, other in pairs
             if (own.saved_bytes or 0) > 1.05 * (other.saved_bytes or 0)]  # fmt: skip
    text = f"\nOver 40 % of peft's excess: {', '.join(slow) or 'none'}. "
    return text + f"Over 105 % of its saved bytes: {', '.join(large) or 'none'}.\n"


def share(own: Row, other: Row) -> float:
    """inlay's excess over the floor as a share of peft's; not a number where peft has none."""
    assert own.overhead is not None
    return (own.overhead - 1) / (other.overhead - 1) if other.overhead and other.overhead > 1 else float("nan")


def line(row: Row, other: Row | None) -> str:
    assert row.overhead is not None
    assert row.saved_bytes is not None
    cells = [row.method, f"{row.trained:,}", f"{row.overhead:.3f}"]
    if other is None or other.overhead is None or other.saved_bytes is None:
        return "| " + " | ".join([*cells, "–", "–", f"{row.saved_bytes / 1e6:.0f}", "–"]) + " |\n"
    rest = [
        f"{other.overhead:.3f}",
        f"{share(row, other):.0%}",
        f"{row.saved_bytes / 1e6:.0f}",
        f"{other.saved_bytes / 1e6:.0f}",
    ]
    return "| " + " | ".join([*cells, *rest]) + " |\n"


if __name__ == "__main__":
    main()
