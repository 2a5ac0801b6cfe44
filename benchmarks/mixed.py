"""What a batch costs whose rows use many different adapters, beside `peft`, method by method.

    python benchmarks/mixed.py                       # every case; some minutes of one core
    python benchmarks/mixed.py lora --rounds 9       # one method

One forward pass in evaluation of MiniLM (random weights) over 64 rows. The base alone, one adapter switched on, and the
rows shared among 1, 4, 16 and 64 adapters in turn (`inlay.route`; `adapter_names=` in `peft`) are timed one after the
other in every round; the median over rounds of each one's ratio to the base counts. Adapters are on every linear layer
of the blocks, or where the method goes by itself. Rows go to `results/mixed/cpu.csv`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import base_model, read, seconds, write
from peft_twins import config
from torch import Tensor, nn

import inlay
from inlay.compare.run import machine
from inlay.core.files import write_text
from inlay.core.method import method_from

RESULTS = Path(__file__).resolve().parent.parent / "results" / "mixed"
MODEL, ROWS, LENGTH = "minilm", 64, 32
SHARED = (1, 4, 16, 64)
"""Adapters among which the rows are shared."""
METHODS = [
    "lora(r=8)", "lora(r=64)", "dora", "vera(r=256)", "loha", "lokr", "krona", "oft(block_size=32)", "boft", "road",
    "ia3", "ssf", "houlsby", "loreft", "bitfit",
]  # fmt: skip
OWN_PLACES = {"houlsby", "loreft", "bitfit"}


@dataclass(frozen=True)
class Row:
    """One method of one library: time over that of the base alone."""

    method: str
    library: str
    one: float
    """One adapter switched on for the whole batch."""
    mixed_1: float
    mixed_4: float
    mixed_16: float
    mixed_64: float
    base_seconds: float
    rounds: int


Run = Callable[[], object]


def inlay_runs(base: nn.Module, spec: str, ids: Tensor) -> dict[str, Run]:
    """What is timed: the switched adapter and the routed batches."""
    model = copy.deepcopy(base)
    where = None if spec in OWN_PLACES else "all-linear"
    for name in names(max(SHARED)):
        inlay.adapt(model, method_from(spec), where, name=name, head=None)
    model.eval()

    def one() -> None:
        inlay.use(model, "a0")
        model(input_ids=ids)

    def mixed(n: int) -> Run:
        def run() -> None:
            with inlay.route(model, dealt(n)):
                model(input_ids=ids)

        return run

    return {"one": one} | {f"mixed_{n}": mixed(n) for n in SHARED}


def peft_runs(base: nn.Module, spec: str, ids: Tensor) -> dict[str, Run] | None:
    """The same of `peft`; None where it has no such method, or no mixed batches of it."""
    own = copy.deepcopy(base)
    paths = [path for path, m in own.named_modules() if isinstance(m, nn.Linear) and "layer" in path]
    made = config(method_from(spec), paths)
    if made is None:
        return None
    import peft

    model = peft.get_peft_model(own, made, adapter_name="a0")
    for name in names(max(SHARED))[1:]:
        model.add_adapter(name, made)
    model.eval()

    def one() -> None:
        model.set_adapter("a0")
        model(input_ids=ids)

    def mixed(n: int) -> Run:
        return lambda: model(input_ids=ids, adapter_names=dealt(n))

    try:
        with torch.no_grad():
            mixed(2)()
    except (TypeError, ValueError, NotImplementedError):
        return None
    return {"one": one} | {f"mixed_{n}": mixed(n) for n in SHARED}


def names(n: int) -> list[str]:
    return [f"a{i}" for i in range(n)]


def dealt(n: int) -> list[str]:
    """An adapter for each row, in turn."""
    return [f"a{i % n}" for i in range(ROWS)]


@torch.no_grad()
def measure(spec: str, rounds: int) -> list[Row]:
    """Both libraries' rows."""
    base = base_model(MODEL).eval().requires_grad_(False)
    ids = torch.randint(5, 1000, (ROWS, LENGTH))
    runs = {"inlay": inlay_runs(base, spec, ids), "peft": peft_runs(base, spec, ids)}
    times: dict[tuple[str, str], list[float]] = {("base", ""): []}
    work: dict[tuple[str, str], Run] = {("base", ""): lambda: base(input_ids=ids)}
    for library, found in runs.items():
        work |= {(library, what): run for what, run in (found or {}).items()}
    for turn in range(rounds + 1):
        for key in sorted(work, reverse=turn % 2 == 1):
            taken = seconds(work[key])
            if turn:  # the first round warms up
                times.setdefault(key, []).append(taken)
    alone = times["base", ""]
    ratio = {key: statistics.median(t / b for t, b in zip(ts, alone, strict=True)) for key, ts in times.items()}
    return [
        Row(spec, library, *(ratio[library, what] for what in found), statistics.median(alone), rounds)
        for library, found in runs.items()
        if found is not None
    ]


def page(rows: list[Row], note: str) -> str:
    about = ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None)
    lines = [
        "# A batch whose rows use different adapters\n\nMade by `python benchmarks/mixed.py`; what is measured is said "
        f"at the top of that file. Times over the base model alone ({rows[0].base_seconds:.2f} s), {MODEL}, {ROWS} × "
        f"{LENGTH} tokens; {about}. {note}\n\n"
        "| Method | | one adapter | "
        + " | ".join(f"{n} mixed" for n in SHARED)
        + " |\n|:--|:--|--:"
        + "|--:" * 4
        + "|\n"
    ]
    for row in rows:
        cells = [row.one, row.mixed_1, row.mixed_4, row.mixed_16, row.mixed_64]
        lines.append(f"| {row.method} | {row.library} | " + " | ".join(f"{c:.2f}" for c in cells) + " |\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="", help="said on the page, about the machine")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    file = RESULTS / "cpu.csv"
    done = {(row.method, row.library): row for row in read(file, Row)}
    for spec in args.methods:
        for row in measure(spec, args.rounds):
            done[row.method, row.library] = row
            print(row, flush=True)
        gc.collect()
        write(file, list(done.values()))
    write_text(RESULTS / "README.md", page(list(done.values()), args.note))


if __name__ == "__main__":
    main()
