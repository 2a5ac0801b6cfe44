"""What the benchmarks share: models with random numbers, clocks, and rows of a CSV file that is written as it grows."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import nn

from inlay.architectures import configuration
from inlay.core.files import write_text
from inlay.plan import skeleton

R = TypeVar("R")


def base_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of that architecture with small random numbers: time does not depend on them."""
    config, task, _ = configuration(name)
    torch.manual_seed(0)
    model = skeleton(config, task, dtype)
    with torch.no_grad():
        for p in model.parameters():  # skeletons hold what was in memory
            p.normal_(0.0, 0.02) if p.dim() > 1 else p.fill_(1.0)
        for key, b in model.named_buffers():
            if b.is_floating_point() and not key.endswith("inv_freq"):
                b.zero_()
    return model


def quiet(model: nn.Module) -> nn.Module:
    """In training mode, as steps are, with every dropout off."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            vars(module)["dropout"] = 0.0
    return model


def seconds(run: Callable[[], Any], device: torch.device | None = None) -> float:
    """What a call takes: the process's own time on one CPU thread, else the wall's."""
    cuda = device is not None and device.type == "cuda"
    clock = time.process_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter
    if cuda:
        torch.cuda.synchronize()
    begin = clock()
    run()
    if cuda:
        torch.cuda.synchronize()
    return clock() - begin


# ---------------------------------------------------------------------- rows
def read(file: Path, kind: type[R]) -> list[R]:
    """The rows of a CSV file, dataclasses of that kind; none where there is no file. Empty cells are None."""
    if not file.exists():
        return []
    hints = get_type_hints(kind)
    with file.open(encoding="utf-8", newline="") as lines:
        return [kind(**{k: cell(v, hints[k]) for k, v in line.items()}) for line in csv.DictReader(lines)]


def cell(text: str, hint: Any) -> Any:
    """A cell as the field's type."""
    if hint is str:
        return text
    kinds = [k for k in getattr(hint, "__args__", (hint,)) if k is not type(None)]
    return kinds[0](text) if text else None


def write(file: Path, rows: Sequence[Any]) -> None:
    """All rows, one dataclass each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(file, text.getvalue())
