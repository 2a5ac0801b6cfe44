"""IST and GaLore in two processes under DDP: the steps that one process takes on the whole batch."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import inlay
from inlay.core.errors import AdapterError

STEPS = 6


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def train(method: Any, rows: slice, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """What some steps on these rows leave: trained tensors, and what IST knows."""
    model = Deep().train()
    adapter = inlay.adapt(model, method, ["re:blocks[.][0-9]"])
    torch.manual_seed(1)
    x, y = torch.randn(8, 8)[rows], torch.randn(8, 8)[rows]
    optimizer, forward = inlay.optimizer(adapter, 0.05), wrap(model)
    for k in range(STEPS):
        (forward(x) - y).square().mean().backward()
        optimizer.step()
        inlay.step(model, (k + 1) / STEPS, optimizer, lambda: (model(x) - y).square().mean())
        optimizer.zero_grad()
    return {name: t.detach().clone().double() for name, t in model.inlay.state_dict().items()}


def work(rank: int, folder: Path, method: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(4 * rank, 4 * rank + 4)
    try:
        found = train(method, rows, lambda m: DistributedDataParallel(m, find_unused_parameters=True))
        save_file(found, folder / f"{rank}.safetensors")
    except AdapterError as error:
        (folder / f"{rank}.txt").write_text(str(error), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def together(folder: Path, method: Any) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(r, folder, method)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


@pytest.mark.parametrize(
    "method", [["lora(r=2)", "ist(every=2, share=0.4)"], ["galore(r=2, every=2)", "bitfit"]], ids=["ist", "galore"]
)
def test_two_processes_take_the_steps_of_one(tmp_path: Path, method: Any) -> None:
    together(tmp_path, method)
    wanted = train(method, slice(0, 8), lambda model: model)
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == wanted.keys()
        for name, t in wanted.items():
            torch.testing.assert_close(found[name], t, rtol=1e-3, atol=1e-5, msg=lambda s, n=name: f"{n}: {s}")
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items()), "no process drifts from the other"


def test_steps_within_the_backward_pass_are_refused(tmp_path: Path) -> None:
    together(tmp_path, "galore(r=2, per_layer=true)")
    for rank in range(2):
        assert "drift apart" in (tmp_path / f"{rank}.txt").read_text(encoding="utf-8")
