"""What it costs to import, attach, save, load, switch, keep, merge and evaluate, beside `peft` in the same process.

    python benchmarks/start.py                       # every section, some minutes of one core each
    python benchmarks/start.py files merge --again   # some of them, measured again

Models have random weights (time does not depend on them). Whatever both libraries can do is timed in turns, the order
changing from round to round; medians count. Times are those of the process on one thread; `import` counts the CPU time
of fresh processes. Rows go to `results/start/cpu.csv`; those that are there are not measured again.

- import: fresh processes.
- attach: a method on every linear layer of the blocks.
- files: saving an adapter (LoRA r = 16 on all linear layers) and loading it onto the plain model.
- many: the n-th of 100 adapters loaded onto one model, and switching when that many are attached.
- memory: what the process grows by for each of 1,000 adapters (100 in `peft`), over the bytes of their tensors.
- merge: merging and unmerging; of inlay's, what computes tensors, and what proves outputs equal. The peak is what the
  process's memory rises by at most, the base's own tensors being set aside for an exact `unmerge`.
- forward: in evaluation, without gradients, over the base alone; `token` is one more token with a cache of 32.
"""

from __future__ import annotations

import argparse
import copy
import gc
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import base_model, read, seconds, write
from peft_twins import config, twin
from torch import nn

import inlay
from inlay.compare.run import machine
from inlay.core import merge as merging
from inlay.core.files import write_text
from inlay.core.method import Method, method_from

RESULTS = Path(__file__).resolve().parent.parent / "results" / "start"
SMALL, LARGE = "minilm", "smollm2-135m-instruct"
LORA = "lora(r=16)"
METHODS = [LORA, "dora(of=lora(r=16))", "vera(r=256)", "oft(block_size=32)", "loha(r=8)", "lokr(r=8)"]
ATTACHED = [*METHODS[:4], "pissa(r=16)"]
LOADED = (1, 2, 5, 20, 60, 100)
PROCESSES = {
    "import torch": ["-c", "import torch"], "import inlay": ["-c", "import inlay"],
    "import inlay.methods": ["-c", "import inlay.methods"], "import peft": ["-c", "import peft"],
    "inlay --help": ["-m", "inlay", "--help"], "inlay methods": ["-m", "inlay", "methods"],
    "inlay plan": ["-m", "inlay", "plan", "--arch", SMALL, "--method", "lora", "--no-memory"],
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One quantity of one library."""

    section: str
    model: str
    method: str
    quantity: str
    library: str
    value: float
    unit: str
    rounds: int

    @property
    def key(self) -> tuple[str, ...]:
        return self.section, self.model, self.method, self.quantity, self.library


@dataclass(frozen=True)
class Case:
    """What is measured at once, and resumed at."""

    section: str
    model: str
    method: str

    def row(self, quantity: str, library: str, value: float, unit: str = "ms", rounds: int = 1) -> Row:
        return Row(self.section, self.model, self.method, quantity, library, value, unit, rounds)


Work = dict[str, Callable[[], float]]
"""By library: do it once and say what it took."""


def taken(work: Work, rounds: int) -> dict[str, float]:
    """Medians in seconds, in turns; the first round warms up."""
    times: dict[str, list[float]] = {library: [] for library in work}
    for turn in range(rounds + 1):
        for library in sorted(work, reverse=turn % 2 == 1):
            gc.collect()
            found = work[library]()
            times[library] += [found] if turn else []
    return {library: statistics.median(found) for library, found in times.items()}


def model(name: str) -> Any:
    return base_model(name).eval().requires_grad_(False)


def paths(name: str) -> list[str]:
    """The linear layers of the blocks."""
    return [path for path, m in base_model(name).named_modules() if isinstance(m, nn.Linear) and "layer" in path]


def peft_config(method: Method, where: list[str]) -> Any:
    import peft

    if type(method).__name__ == "PiSSA":
        return peft.LoraConfig(r=method.fields()["r"], init_lora_weights="pissa_niter_4", target_modules=where)
    return config(method, where)


# ---------------------------------------------------------------------- sections
def imports(case: Case, rounds: int) -> Iterator[Row]:
    def process(words: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    work: Work = {what: (lambda words=words: process(words)) for what, words in PROCESSES.items()}
    for what, found in taken(work, rounds).items():
        yield case.row(what, "peft" if "peft" in what else "torch" if "torch" in what else "inlay", 1e3 * found,
                       rounds=rounds)  # fmt: skip


def attach(case: Case, rounds: int) -> Iterator[Row]:
    base, method, where = model(case.model), method_from(case.method), paths(case.model)

    def ours() -> float:
        own = copy.deepcopy(base)
        return seconds(lambda: inlay.adapt(own, method, "all-linear", head=None))

    def theirs() -> float:
        import peft

        own, made = copy.deepcopy(base), peft_config(method, where)
        return seconds(lambda: peft.get_peft_model(own, made))

    for library, found in taken({"inlay": ours, "peft": theirs}, rounds).items():
        yield case.row("attach", library, 1e3 * found, rounds=rounds)


def files(case: Case, rounds: int) -> Iterator[Row]:
    import peft

    method, where = method_from(case.method), paths(case.model)
    own, other = model(case.model), model(case.model)
    adapter, wrapped = inlay.adapt(own, method, where, head=None), peft.get_peft_model(other, config(method, where))
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = f"{folder}/inlay", f"{folder}/peft"
        saves: Work = {
            "inlay": lambda: seconds(lambda: adapter.save(ours)),
            "peft": lambda: seconds(lambda: wrapped.save_pretrained(theirs)),
        }
        saved = taken(saves, rounds)
        inlay.detach(own)
        plain = wrapped.unload()

        def load() -> float:
            found = seconds(lambda: inlay.load(own, ours))
            inlay.detach(own)
            return found

        def load_theirs() -> float:
            made: list[Any] = []
            found = seconds(lambda: made.append(peft.PeftModel.from_pretrained(plain, theirs)))
            made[0].unload()
            return found

        loaded = taken({"inlay": load, "peft": load_theirs}, rounds)
    for library in saved:
        yield case.row("save", library, 1e3 * saved[library], rounds=rounds)
        yield case.row("load", library, 1e3 * loaded[library], rounds=rounds)


def many(case: Case, rounds: int) -> Iterator[Row]:
    import peft

    method, where = method_from(case.method), paths(case.model)[::2]
    own, other = model(case.model), model(case.model)
    with tempfile.TemporaryDirectory() as folder:
        inlay.adapt(own, method, where, head=None).save(folder + "/inlay")
        inlay.detach(own)
        wrapped = peft.get_peft_model(other, config(method, where), adapter_name="n0")
        wrapped.save_pretrained(folder + "/peft")
        times: dict[str, list[float]] = {"inlay": [], "peft": []}
        for n in range(1, LOADED[-1] + 2):
            gc.collect()
            times["inlay"].append(seconds(lambda n=n: inlay.load(own, folder + "/inlay", name=f"n{n}")))
            times["peft"].append(seconds(lambda n=n: wrapped.load_adapter(folder + "/peft/n0", adapter_name=f"n{n}")))
    for library, found in times.items():
        for n in LOADED:
            around = found[:1] if n == 1 else found[n - 2 : n + 1]
            yield case.row(f"load no. {n}", library, 1e3 * statistics.median(around), rounds=len(around))
    switch: Work = {
        "inlay": lambda: seconds(lambda: (inlay.use(own, "n1"), inlay.use(own, "n50"))) / 2,
        "peft": lambda: seconds(lambda: (wrapped.set_adapter("n1"), wrapped.set_adapter("n50"))) / 2,
    }
    for library, found_ in taken(switch, rounds).items():
        yield case.row(f"switch, {LOADED[-1]} attached", library, 1e3 * found_, rounds=rounds)


def memory(case: Case, rounds: int) -> Iterator[Row]:
    """Each library in a process of its own."""
    for library, n in (("inlay", 1000), ("peft", 100)):
        words = [sys.executable, __file__, "--grow", library, case.model, case.method, str(n)]
        grown, held = map(float, subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-2:])
        yield case.row("bytes of tensors", library, held, "B")
        yield case.row(f"grown by, each of {n}", library, grown, "B")


def grow(library: str, name: str, spec: str, number: str) -> None:
    """Attach that many adapters, and print what each added to the process and what its tensors hold."""
    n = int(number)
    own, method, where = model(name), method_from(spec), paths(name)[::2]
    if library == "inlay":
        held = sum(p.nbytes for p in inlay.adapt(own, method, where, name="first", head=None).parameters())

        def add(one: str) -> None:
            inlay.adapt(own, method, where, name=one, head=None)
    else:
        import peft

        made: Any = config(method, where)
        wrapped = peft.get_peft_model(own, made, adapter_name="first")
        held = sum(p.nbytes for p in own.parameters() if p.requires_grad)

        def add(one: str) -> None:
            wrapped.add_adapter(one, made)

    for k in range(20):  # what both set aside at first
        add(f"w{k}")
    before = resident()
    for k in range(n):
        add(f"n{k}")
    gc.collect()
    print((resident() - before) / n, held)


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(name: str, spec: str) -> None:
    """Merge once, and print what the process's memory rises by at most."""
    own = model(name)
    adapter = inlay.adapt(own, method_from(spec), paths(name), head=None)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins again
    adapter.merge()
    high = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(high.split()[1]) * 1024 - before)


def merge(case: Case, rounds: int) -> Iterator[Row]:
    own, method, where = model(case.model), method_from(case.method), paths(case.model)
    adapter = inlay.adapt(own, method, where, head=None)
    other: Any = twin(method, model(case.model), where)
    arithmetic: list[float] = []
    undo: dict[str, list[float]] = {"inlay": [], "peft": []}
    compute = merging.merged_tensors

    def timed(*given: Any) -> Any:
        found: list[Any] = []
        arithmetic[-1] += seconds(lambda: found.append(compute(*given)))
        return found[0]

    def ours() -> float:
        arithmetic.append(0.0)
        with patch.object(merging, "merged_tensors", timed):
            found = seconds(adapter.merge)
        undo["inlay"].append(seconds(adapter.unmerge))
        return found

    def theirs() -> float:
        found = seconds(other.merge_adapter)
        undo["peft"].append(seconds(other.unmerge_adapter))
        return found

    whole = taken({"inlay": ours, "peft": theirs}, rounds)
    for library, found in whole.items():
        yield case.row("merge", library, 1e3 * found, rounds=rounds)
        yield case.row("unmerge", library, 1e3 * statistics.median(undo[library][1:]), rounds=rounds)
    yield case.row("of it, computing tensors", "inlay", 1e3 * statistics.median(arithmetic[1:]), rounds=rounds)
    words = [sys.executable, __file__, "--peak", case.model, case.method]
    high = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1]
    yield case.row("peak over before", "inlay", float(high) / 1e6, "MB")
    merged = sum(4 * own.get_submodule(path)._parameters["weight"].numel() for path in where)
    yield case.row("bytes of the merged tensors", "inlay", merged / 1e6, "MB")


@torch.no_grad()
def forward(case: Case, rounds: int) -> Iterator[Row]:
    name, _, shape = case.model.partition(" ")
    base, method, where = model(name), method_from(case.method), paths(name)
    own = copy.deepcopy(base)
    inlay.adapt(own, method, where, head=None)
    runs = {"base": base, "inlay": own.eval()}
    other = twin(method, copy.deepcopy(base), where)
    if other is not None:
        runs["peft"] = other.eval()

    def run(one: Any) -> Callable[[], float]:
        if shape != "token":
            rows, length = map(int, shape.split("x"))
            ids = torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
            return lambda: seconds(lambda: one(input_ids=ids))
        cache = one(input_ids=torch.arange(5, 37)[None], use_cache=True).past_key_values

        def token() -> float:
            found = seconds(lambda: one(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True))
            cache.crop(-1)
            return found

        return token

    times = taken({library: run(one) for library, one in runs.items()}, rounds)
    for library, found in times.items():
        yield case.row("forward", library, 1e3 * found, rounds=rounds)


SECTIONS: dict[str, tuple[Callable[[Case, int], Iterator[Row]], list[Case], int]] = {
    "import": (imports, [Case("import", "", "")], 5),
    "attach": (attach, [Case("attach", name, spec) for name in (SMALL, LARGE) for spec in ATTACHED], 3),
    "files": (files, [Case("files", name, LORA) for name in (SMALL, LARGE)], 5),
    "many": (many, [Case("many", SMALL, "lora(r=8)"), Case("many", SMALL, "vera(r=256)")], 5),
    "memory": (memory, [Case("memory", SMALL, "vera(r=256)")], 1),
    "merge": (merge, [Case("merge", LARGE, spec) for spec in METHODS], 3),
    "forward": (
        forward,
        [Case("forward", f"{SMALL} 32x128", spec) for spec in METHODS]
        + [Case("forward", f"{SMALL} 1x16", spec) for spec in METHODS]
        + [Case("forward", f"{LARGE} token", spec) for spec in METHODS],
        7,
    ),
}
"""What measures a section, its cases, and rounds of each."""


# ---------------------------------------------------------------------- all of them
def page(rows: list[Row], note: str) -> str:
    about = ", ".join(f"{key} {value}" for key, value in machine().items() if value is not None)
    parts = [
        "# Importing, attaching, saving, loading, switching, merging, evaluating\n\nMade by `python "
        "benchmarks/start.py`; what is measured is said at the top of that file. Random weights, float32, one thread, "
        f"CPU time; medians. `peft` and inlay took turns in one process, so their ratio is firmer. {about}, "
        f"peft {version('peft')}. {note}\n"
    ]
    for section in SECTIONS:
        here = [row for row in rows if row.section == section]
        if not here:
            continue
        base = any(row.library in ("base", "torch") for row in here)
        parts.append(f"\n## {section}\n\n| Model | Method | What | inlay | peft |" + (" base |" if base else ""))
        parts.append("\n|:--|:--|:--|--:|--:|" + ("--:|" if base else "") + "\n")
        lines: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in here:
            lines.setdefault(row.key[1:4], {})[row.library] = row
        for key, found in lines.items():
            cells = [shown(found.get(library)) for library in ("inlay", "peft")]
            cells += [shown(found.get("base") or found.get("torch"))] if base else []
            parts.append("| " + " | ".join([*key, *cells]) + " |\n")
    return "".join(parts)


def shown(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{row.value:,.0f} {row.unit}" if row.value >= 100 else f"{row.value:.3g} {row.unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, help="instead of each section's own")
    parser.add_argument("--note", default="", help="a sentence for the page, as on what else the machine did")
    parser.add_argument("--again", action="store_true", help="measure rows that are there again")
    parser.add_argument("--grow", nargs=4, help=argparse.SUPPRESS)  # what runs in processes of their own
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.grow or args.peak:
        grow(*args.grow) if args.grow else peak(*args.peak)
        sys.exit()
    file = RESULTS / "cpu.csv"
    done = {row.key: row for row in read(file, Row)}
    for section in args.sections:
        measure, cases, rounds = SECTIONS[section]
        for case in cases:
            if not args.again and any(key[:3] == (case.section, case.model, case.method) for key in done):
                continue
            for row in measure(case, args.rounds or rounds):
                done[row.key] = row
                print(*row.key, shown(row), flush=True)
            write(file, list(done.values()))
            gc.collect()
    write_text(RESULTS / "README.md", page(list(done.values()), args.note))


if __name__ == "__main__":
    main()
