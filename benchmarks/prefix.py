"""Epoch time with the frozen-prefix cache against without: LoRA in the top 25 % and top 50 % of the layers.

    python benchmarks/prefix.py              # measures what is not measured yet, then writes the tables
    python benchmarks/prefix.py --rounds 5   # more rounds

MiniLM on TREC (text) and DINOv2-S on CIFAR-10 (images), with the steps of `inlay train`. In every round an epoch is
taken with the whole model and one from kept states, by turns on the same model, and the states are computed once more,
which is what the first epoch costs on top. Seconds are those that the process had the core (`time.process_time`), on
one thread: they mean the same on a machine that others use. Rounds are kept in `runs/prefix/rounds.jsonl`; after an
interruption the same command goes on from there. Tables go to `results/prefix`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inlay.compare.run import machine
from inlay.core import active as core
from inlay.core.files import write_text
from inlay.evaluate.predict import Source, whole
from inlay.recipe import Recipe, load_recipe
from inlay.train.frozen import Frozen
from inlay.train.loop import Run
from inlay.train.progress import Silent
from inlay.train.source import source_for
from inlay.work import Shared, open_work

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUN = ROOT / "results" / "prefix", ROOT / "runs" / "prefix"
COMMON: dict[str, Any] = {
    "method": "lora", "base_dropout": False, "cache": "memory", "batch": 16, "epochs": 100, "device": "cpu",
    "output": str(RUN / "run"),
}  # fmt: skip
TASKS: dict[str, tuple[int, dict[str, Any]]] = {
    "MiniLM, TREC": (6, {"model": "minilm", "data": "trec", "limit": {"train": 320, "validation": 16, "test": 16}}),
    "DINOv2-S, CIFAR-10 at 112 pixels": (12, {
        "model": "dinov2-small", "data": "cifar10", "image_size": 112,
        "limit": {"train": 64, "validation": 16, "test": 16}}),
}  # fmt: skip
SHARES = (0.25, 0.5)


def recipe_of(task: str, share: float) -> Recipe:
    """LoRA in so large a share of the layers, rounded up, the topmost ones."""
    layers, fields = TASKS[task]
    top = math.ceil(share * layers)
    return load_recipe({**COMMON, **fields, "layers": list(range(layers - top, layers))}, Recipe)


def measure(task: str, share: float, rounds: list[int], keep: Callable[[dict[str, Any]], None], shared: Shared) -> None:
    """The rounds that are asked for, each handed to `keep` when it is done."""
    recipe = recipe_of(task, share)
    RUN.mkdir(parents=True, exist_ok=True)
    work = open_work(recipe, recipe.seed, shared)
    adapter = work.attach(recipe)
    try:
        run = Run(recipe, work, adapter, "accuracy", Silent())
        plain, steps = whole(work), run.order.steps_per_epoch

        def epoch(source: Source, number: int) -> float:
            run.source = source
            began = time.process_time()
            for step in range(number * steps, (number + 1) * steps):
                run.step(step)
            return time.process_time() - began

        epoch(plain, 0)  # images are read, caches are warm
        for number in rounds:
            kept = source_for(work, adapter, recipe, COMMON["epochs"], print).source
            assert isinstance(kept, Frozen)
            began = time.process_time()
            kept.prepare("train")
            filling = time.process_time() - began
            keep({
                "task": task, "share": share, "round": number, "layers": recipe.layers, "rows": len(work.rows("train")),
                "bytes": sum(found.states.flat.nbytes for found in kept.found.values()), "filling": filling,
                "plain": epoch(plain, 2 * number + 1), "cached": epoch(kept, 2 * number + 1),
            })  # fmt: skip
    finally:
        core.detach(work.model)


def publish(points: list[dict[str, Any]]) -> None:
    """Medians as CSV and markdown, and every round with the machine as JSON."""
    table = []
    for task, (layers, _) in TASKS.items():
        for share in SHARES:
            rounds = [p for p in points if (p["task"], p["share"]) == (task, share)]
            if not rounds:
                continue
            plain, cached, filling = (statistics.median(p[k] for p in rounds) for k in ("plain", "cached", "filling"))
            table.append({
                "task": task, "trained_layers": len(rounds[0]["layers"]), "layers": layers, "rounds": len(rounds),
                "plain_seconds": round(plain, 3), "cached_seconds": round(cached, 3),
                "filling_seconds": round(filling, 3), "ratio": round(cached / plain, 3),
                "first_ratio": round((filling + cached) / plain, 3),
                "kilobytes_per_row": round(rounds[0]["bytes"] / rounds[0]["rows"] / 1e3, 1),
            })  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_text(RESULTS / "epochs.csv", text.getvalue())
    write_text(RESULTS / "epochs.json", json.dumps({"machine": machine(), "rounds": points}, indent=1) + "\n")
    lines = [
        "# What is frozen, computed once",
        "",
        "Made by `python benchmarks/prefix.py`. LoRA at its defaults in the topmost 25 % and 50 % of the layers,",
        "rounded up; base dropout off, batches of 16, float32 on one CPU thread; the steps of `inlay train`, without",
        "evaluation. Seconds of an epoch that the process had the core (others used the machine as well), medians of",
        "rounds taken by turns. *Ratio*: an epoch from kept states to one of the whole model; the first epoch computes",
        "the states besides.",
        "",
        "| task | trained layers | whole model | from kept states | ratio | ratio, first epoch | kept per row |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {r['task']} | top {r['trained_layers']} of {r['layers']} | {r['plain_seconds']:.2f} s | "
            f"{r['cached_seconds']:.2f} s | {r['ratio']:.2f} | {r['first_ratio']:.2f} | {r['kilobytes_per_row']} kB |"
            for r in table
        ),
        "",
        "The rounds themselves and the machine: `epochs.json`; the table as data: `epochs.csv`.",
    ]
    write_text(RESULTS / "README.md", "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = RUN / "rounds.jsonl"
    points = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.exists() else []

    def keep(point: dict[str, Any]) -> None:
        points.append(point)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        print(point, flush=True)

    for task in TASKS:
        shared = Shared()
        for share in SHARES:
            done = {p["round"] for p in points if (p["task"], p["share"]) == (task, share)}
            todo = [number for number in range(args.rounds) if number not in done]
            if todo:
                measure(task, share, todo, keep, shared)
    publish(points)


if __name__ == "__main__":
    main()
