"""LongLoRA on SmolLM2 and whole books: a context of 8k stretched to 16k, and what a step costs against full attention.

    python benchmarks/longlora.py extend     # trains, then perplexity by position: base, base with p/s, LongLoRA
    python benchmarks/longlora.py cost       # time and peak memory of a step at 2k, 4k and 8k

Tables and data go to results/longlora. Both run on one CPU core, in bfloat16. Times are those that the process had the
core (`time.process_time`): they mean the same on a machine that others use.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig

import inlay
import inlay.data
import inlay.models
from inlay.core.adapter import Adapter
from inlay.core.files import write_text
from inlay.data.documents import cut
from inlay.methods import LongLoRA
from inlay.plan import fake, skeleton
from inlay.train.groups import set_rate
from inlay.train.measure import step_memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUN = ROOT / "results" / "longlora", ROOT / "runs" / "longlora"
MODEL, DATA, NATIVE = "smollm2-135m-instruct", "gutenberg", 8192
CHUNK = 2048
"""Tokens whose logits (49,152 each) are held at once."""
EDGES = (0, 2048, 4096, 8192, 10240, 12288, 14336, 16384)
"""Positions between which perplexity is averaged."""


def opened(**lengths: int) -> tuple[nn.Module, dict[str, list[Tensor]]]:
    """The model, and splits of the books in whole rows of so many tokens."""
    found, data = inlay.models.open(MODEL, "causal-lm", dtype="bfloat16"), inlay.data.load(DATA)
    splits = {}
    for split, n in lengths.items():
        rows = cut(found.processor, data.splits[split].column("text"), n)
        splits[split] = [torch.tensor(row) for row in rows if len(row) == n]
    return found.model, splits


def losses(model: Any, ids: Tensor) -> Iterable[Tensor]:
    """The loss of every token but the first, in chunks, so that the logits of a long row are never there at once."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]

    def loss(h: Tensor, goal: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(h).float(), goal, reduction="none")

    for h, goal in zip(hidden[:-1].split(CHUNK), ids[0, 1:].split(CHUNK), strict=True):
        yield checkpoint(loss, h, goal, use_reentrant=False) if torch.is_grad_enabled() else loss(h, goal)


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.cat(list(losses(model, ids))).mean()


# ---------------------------------------------------------------------- a longer context
def extend(args: argparse.Namespace) -> None:
    """Train with S²-Attn at twice the base's context; perplexity by position on books of other authors.

    An adapter in `runs/longlora` is not trained again, but measured.
    """
    torch.manual_seed(0)
    model, splits = opened(train=args.train_length, test=args.length)
    test = splits["test"][:: len(splits["test"]) // args.rows][: args.rows]  # from all books
    method, course = LongLoRA(stretch=args.length / NATIVE, groups=4), RUN / "training.json"
    if course.exists():
        adapter = inlay.load(model, RUN)
    else:
        adapter = inlay.adapt(model, method)
        log = train(model, adapter, splits["train"], args)
        adapter.save(str(RUN), model=MODEL, data=DATA, steps=args.steps, length=args.length)
        write_json(course, {"settings": settings(args), "steps": log})
    table = [measured("LongLoRA", model, test)]
    with inlay.disabled(model):
        table.insert(0, measured("base", model, test))
    inlay.adapt(model, method.replace(r=0, embeddings=False, norms=False), name="stretched")
    table.insert(1, measured("base with p/s, not trained", model, test))
    publish(table, json.loads(course.read_text(encoding="utf-8")), adapter, args)


def train(model: Any, adapter: Adapter, rows: Sequence[Tensor], args: argparse.Namespace) -> list[dict[str, float]]:
    """AdamW over rows in random order, one a step, each method at its own rate: a linear rise, then a linear fall."""
    optimizer = inlay.optimizer(adapter)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    log: list[dict[str, float]] = []
    for step in range(args.steps):
        share = min((step + 1) / 3, (args.steps - step) / (args.steps - 2))
        set_rate(optimizer, share)
        began = time.process_time()
        loss = mean_loss(model, rows[order[step % len(order)]][None])
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step + 1, "loss": loss.item(), "seconds": time.process_time() - began})
        print(log[-1], flush=True)
    model.activation_checkpointing_disable()
    return log


@torch.no_grad()
def measured(label: str, model: Any, rows: Sequence[Tensor]) -> dict[str, Any]:
    """Perplexity between `EDGES`, full attention."""
    model.eval()
    found = torch.stack([torch.cat(list(losses(model, ids[None]))) for ids in rows]).mean(0)
    spans = [(a, min(b, len(found))) for a, b in pairwise(EDGES) if a < len(found)]
    line = {f"{a}-{b}": math.exp(found[a:b].mean().item()) for a, b in spans}
    print(label, line, flush=True)
    return {"model": label, **line}


def publish(table: list[dict[str, Any]], course: dict[str, Any], adapter: Adapter, args: argparse.Namespace) -> None:
    """The table of perplexities as CSV and markdown, and the run as JSON."""
    write_csv(RESULTS / "extend.csv", table)
    seconds, own = statistics.median(point["seconds"] for point in course["steps"]), course["settings"]
    spans = [key for key in table[0] if key != "model"]
    lines = [
        f"# SmolLM2-135M from {NATIVE} to {args.length} tokens",
        "",
        f"Perplexity by position in {args.rows} x {args.length} tokens of authors that training has not seen, full",
        f"attention. Trained: {own['steps']} steps of one row of {own['train_length']} tokens in S²-Attn of 4 groups,",
        f"{adapter.adapter_parameters:,} numbers, {seconds:.0f} s a step (median) on one CPU core in bfloat16.",
        "",
        "| model | " + " | ".join(spans) + " |",
        "|---|" + "--:|" * len(spans),
        *(f"| {row['model']} | " + " | ".join(f"{row[s]:.1f}" for s in spans) + " |" for row in table),
    ]
    write_text(RESULTS / "extend.md", "\n".join(lines) + "\n")
    write_json(RESULTS / "extend.json", {"settings": settings(args), "perplexity": table, "training": course})


# ---------------------------------------------------------------------- what a step costs
def cost(args: argparse.Namespace) -> None:
    """A training step in S²-Attn and in full attention with the same trained tensors, by turns.

    Measurements are kept in `runs/longlora/cost.jsonl`; after an interruption the same command goes on from there.
    """
    model, splits = opened(test=max(args.lengths))
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    kept = RUN / "cost.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    points = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for turn in range(args.repeats):
        for length in args.lengths:
            for way, method in ways().items():
                if any((p["turn"], p["tokens"], p["attention"]) == (turn, length, way) for p in points):
                    continue
                adapter = inlay.adapt(model, method)
                ids = splits["test"][turn][None, :length]
                began = time.process_time()
                peak = step_bytes(adapter, ids)
                seconds = time.process_time() - began
                points.append({"turn": turn, "tokens": length, "attention": way, "seconds": seconds, "peak": peak})
                inlay.detach(model)
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(points[-1], ensure_ascii=False) + "\n")
                print(points[-1], flush=True)
    unfused = {length: predicted(length) for length in args.lengths}
    publish_cost(points, unfused, args)


def ways() -> dict[str, Any]:
    return {"S²-Attn, 4 groups": LongLoRA(), "full, fused kernel": list(LongLoRA().beside())}


def step_bytes(adapter: Adapter, ids: Tensor) -> int:
    """Peak of a training step: what the model holds, AdamW's moments, activations and gradients."""
    model, optimizer = adapter.model, inlay.optimizer(adapter)
    return step_memory(partial(mean_loss, model.train(), ids), model, {"input_ids": ids}, optimizer)[1]


def predicted(length: int) -> int:
    """The same with attention as separate operations, which hold n² numbers a head: on shapes, nothing is computed."""
    config = AutoConfig.from_pretrained(inlay.models.open(MODEL, "causal-lm").source)
    config._attn_implementation = "eager"
    with fake():
        model = skeleton(config, "causal-lm", torch.bfloat16)
        adapter = inlay.adapt(model, ways()["full, fused kernel"])
        model.activation_checkpointing_enable({"use_reentrant": False})
        return step_bytes(adapter, torch.zeros(1, length, dtype=torch.long))


def publish_cost(points: list[dict[str, Any]], unfused: dict[int, int], args: argparse.Namespace) -> None:
    """The table as CSV and markdown, and every measurement as JSON."""
    table: list[dict[str, Any]] = []
    for length in args.lengths:
        for way in ways():
            runs = [p for p in points if (p["tokens"], p["attention"]) == (length, way)]
            seconds = [p["seconds"] for p in runs]
            table.append({"tokens": length, "attention": way, "seconds": round(statistics.median(seconds), 1),
                          "fastest": round(min(seconds), 1), "slowest": round(max(seconds), 1),
                          "peak_bytes": max(p["peak"] for p in runs)})  # fmt: skip
        table.append({"tokens": length, "attention": "full, not fused", "seconds": None, "fastest": None,
                      "slowest": None, "peak_bytes": unfused[length]})  # fmt: skip
    write_csv(RESULTS / "cost.csv", table)
    write_json(RESULTS / "cost.json", {"settings": settings(args), "measured": points, "predicted": unfused})
    lines = [
        "# A training step of SmolLM2-135M, S²-Attn against full attention",
        "",
        "One row, forward and backward, bfloat16 base, activation checkpointing, the same trained tensors, by turns on",
        f"one CPU core. Seconds: median (fastest to slowest) of {args.repeats} turns of the time the process had the",
        "core, which other work shared. Peak: the allocator's own record and AdamW's moments (`inlay.train.measure`).",
        "torch's fused kernel never holds the n² scores of full attention, so memory is the same; without it they are",
        "held, which was predicted on shapes alone (as `inlay plan` does) and not run.",
        "",
        "| tokens | attention | seconds | peak |",
        "|--:|---|--:|--:|",
        *(
            f"| {r['tokens']} | {r['attention']} | "
            + ("–" if r["seconds"] is None else f"{r['seconds']} ({r['fastest']} to {r['slowest']})")
            + f" | {r['peak_bytes'] / 1e9:.2f} GB |"
            for r in table
        ),
    ]
    write_text(RESULTS / "cost.md", "\n".join(lines) + "\n")


# ---------------------------------------------------------------------- files
def settings(args: argparse.Namespace) -> dict[str, Any]:
    own = {k: v for k, v in vars(args).items() if k != "run"}
    return {**own, "model": MODEL, "data": DATA, "torch": torch.__version__, "threads": torch.get_num_threads()}


def write_json(path: Path, what: Any) -> None:
    write_text(path, json.dumps(what, indent=1, ensure_ascii=False) + "\n")


def write_csv(path: Path, table: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("extend", help="train at twice the context, then perplexity by position")
    one.add_argument("--length", type=int, default=2 * NATIVE)
    one.add_argument("--train-length", type=int, default=4096)
    one.add_argument("--steps", type=int, default=14)
    one.add_argument("--rows", type=int, default=2)
    one.set_defaults(run=extend)
    two = commands.add_parser("cost", help="time and memory of a step")
    two.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    two.add_argument("--repeats", type=int, default=2)
    two.set_defaults(run=cost)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
