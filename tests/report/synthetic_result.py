"""A made-up comparison with plausible shape, for tests of rendering only: no run stands behind these numbers."""

from __future__ import annotations

import dataclasses
import math
import random

from inlay.report import Cell, Result

BASE = 22_713_216
HEAD = 2_310

# label, kind, adapter parameters, accuracy, seconds, memory in MB, saved MB, learning rate, options
METHODS = [
    ("Full fine-tuning", "baseline", BASE, 0.936, 148.0, 812, 395, 5e-5, {}),
    ("Head only", "baseline", 0, 0.712, 21.0, 251, 4, 1e-3, {}),
    ("BitFit", "hidden", 51_456, 0.902, 92.0, 402, 171, 2e-3, {"biases": "all"}),
    ("Norm tuning", "hidden", 9_984, 0.874, 90.0, 398, 169, 3e-3, {}),
    ("LoRA r=8", "weight", 147_456, 0.931, 112.0, 447, 236, 5e-4, {"r": 8, "alpha": 16, "where": ["attn.q", "attn.v"]}),
    ("LoRA r=2", "weight", 36_864, 0.921, 110.0, 444, 233, 8e-4, {"r": 2, "alpha": 4, "where": ["attn.q", "attn.v"]}),
    ("DoRA r=8", "weight", 152_064, 0.934, 171.0, 512, 301, 5e-4, {"r": 8, "of": {"method": "LoRA", "alpha": 16}}),
    ("VeRA r=256", "weight", 7_680, 0.917, 124.0, 463, 244, 1e-2, {"r": 256, "d_initial": 0.1}),
    ("DVoRA r=256", "weight", 12_288, 0.922, 183.0, 521, 307, 1e-2, {"r": 256}),
    ("IA³", "hidden", 13_824, 0.889, 97.0, 411, 188, 8e-3, {"where": ["attn.k", "attn.v", "mlp.down"]}),
    ("Pfeiffer adapter", "hidden", 301_248, 0.929, 104.0, 431, 214, 1e-3, {"reduction": 16, "activation": "gelu"}),
    ("LoReFT r=4", "hidden", 18_456, 0.909, 95.0, 405, 176, 4e-3, {"r": 4, "positions": "f3+l3"}),
    ("Prompt tuning n=20", "tokens", 7_680, 0.806, 131.0, 489, 262, 3e-2, {"n": 20, "init": "vocabulary"}),
    ("Prefix tuning n=10", "tokens", 92_160, 0.893, 108.0, 437, 221, 5e-3, {"n": 10, "reparameterised": False}),
]  # fmt: skip


def cell(label, kind, parameters, accuracy, seconds, memory, saved, rate, options, seed, steps=24) -> Cell:
    random_numbers = random.Random(f"{label} {seed}")
    got = accuracy + random_numbers.gauss(0, 0.0035)
    curve = []
    for index in range(1, steps + 1):
        fall = math.exp(-index / (3 + 4 * (1 - accuracy) * 10))
        point = {"step": index * 25, "epoch": index / 8, "loss": 0.35 * (1.15 - got) + 1.7 * fall}
        point["loss"] *= 1 + random_numbers.gauss(0, 0.05)
        if index % 4 == 0:
            point["accuracy"] = got - 0.5 * fall + random_numbers.gauss(0, 0.004)
        curve.append(point)
    return Cell(
        method=label,
        kind=kind,
        seed=seed,
        settings={"method": label.split()[0].lower(), **options, "learning_rate": rate, "epochs": 3, "batch": 32},
        error=None,
        metrics={"accuracy": got, "macro_f1": got - 0.012 + random_numbers.gauss(0, 0.003)},
        adapter_parameters=parameters,
        head_parameters=HEAD,
        base_parameters=BASE,
        file_bytes=(parameters + HEAD) * 4 + 1_850,
        train_seconds=seconds * (1 + random_numbers.gauss(0, 0.02)),
        peak_memory_bytes=int(memory * 1e6 * (1 + random_numbers.gauss(0, 0.004))),
        saved_for_backward_bytes=int(saved * 1e6),
        curve=curve,
    )


def failed(run: Cell, error: str) -> Cell:
    return dataclasses.replace(run, error=error, metrics={}, train_seconds=math.nan, curve=[])


def comparison(seeds: int = 3) -> Result:
    cells = [cell(*method, seed) for method in METHODS for seed in range(seeds)]
    lost = ("GaLore r=64", "gradient", 0, 0.0, 0.0, 0, 0, 1e-3, {"r": 64})
    cells += [failed(cell(*lost, seed), "out of memory: 3.1 GB asked, 1.2 GB free") for seed in range(seeds)]
    cells.append(failed(cell(*METHODS[-1], seeds), "loss became NaN at step 140; lower the learning rate"))
    return Result(
        title="Question types with a frozen encoder",
        model="MiniLM-L6 (22.7M parameters)",
        data="synthetic questions, 6 classes",
        metric="accuracy",
        metrics=["accuracy", "macro_f1"],
        cells=cells,
        machine={"cpu": "Example CPU, 2.6 GHz", "cores": 2, "torch": "2.13.0", "transformers": "5.23.0",
                 "inlay": "0.1.0", "date": "2025-11-21"},
        notes=["Made-up numbers: this report tests how a report looks."],
        recipe={"model": "minilm", "data": "questions", "epochs": 3, "batch": 32, "seeds": list(range(seeds))},
        baseline="Full fine-tuning",
    )  # fmt: skip
