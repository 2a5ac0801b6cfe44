"""`import inlay` stays close to `import torch`: transformers and the rest are imported when used."""

import subprocess
import sys
import time


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def test_importing_costs_little_more_than_torch():
    torch, inlay = [], []
    for _ in range(4):  # interleaved; the fastest of each is the least disturbed
        torch.append(seconds("import torch"))
        inlay.append(seconds("import torch, inlay, inlay.methods"))
    assert min(inlay) / min(torch) < 1.3


HEAVY = ("transformers", "datasets", "sklearn", "PIL", "pyarrow", "rich", "peft")


def test_nothing_heavy_is_imported():
    code = f"import sys, inlay, inlay.methods, inlay.recipe; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"
