"""One of two processes that train together: `python engine_worker.py RANK FOLDER`.

`FOLDER/jobs.json` lists what to train, `[key, bench, engine, method, where]` each. What came out is written to
`KEY-RANK.safetensors` (losses, gradients and parameters, whole) and `facts-RANK.json`.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from engine_steps import Run, adapted, copied, loss_of, recomputed, train, trained
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

import inlay
from inlay.core import checkpoint
from inlay.core.adapter import Adapter
from inlay.core.errors import InlayError
from laws.benches import Inputs, benches

SIZE = 2


def share(feed: Inputs, rank: int, bench: str) -> Inputs:
    """This process's rows of the batch."""
    rows = len(next(iter(feed.values()))) // SIZE
    return benches()[bench].pick(feed, list(range(rank * rows, (rank + 1) * rows)))


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2 as it is used: blocks, what is around them, and the root."""
    mesh = init_device_mesh("cpu", (SIZE,))
    inner = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    names = ("bert.embeddings", "classifier", "model.embed_tokens", "lm_head")
    inner += [m for name, m in model.named_modules() if name in names]
    for module in inner:
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def prepared(model: nn.Module) -> nn.Module:
    """What accelerate makes of a model for FSDP2: it empties, shards and refills it.

    Accelerate itself asks for a GPU, so what it would read from itself is handed to its function.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True,
        transformer_cls_names_to_wrap=["BertLayer"],
    )  # fmt: skip
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", device=torch.device("cpu"),
        is_main_process=dist.get_rank() == 0,
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, model)


ENGINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "accelerate": lambda model: Accelerator(cpu=True).prepare(model),
    "fsdp": sharded,
    "accelerate-fsdp": prepared,
    "ddp-recomputed": lambda model: DistributedDataParallel(recomputed(model)),
    "fsdp-recomputed": lambda model: sharded(recomputed(model)),
    "apart": lambda model: model,
}
"""The last is none: processes that do not speak to each other, which the comparison must see."""


def kept(found: Run, path: Path) -> None:
    tensors = {f"loss.{k}": loss for k, loss in enumerate(found.losses)}
    for part in ("gradients", "parameters", "start"):
        tensors |= {f"{part}.{name}": t.contiguous() for name, t in getattr(found, part).items()}
    save_file(tensors, path)


def job(rank: int, folder: Path, key: str, bench: str, engine: str, spec: Any, where: list[str] | None) -> dict:
    """Train as the engine does; facts about how the tensors were held."""
    model = adapted(spec, bench, where=where)
    wrapped = ENGINES[engine](model)
    found = train(model, share(benches()[bench].feed(), rank, bench), forward=wrapped)
    kept(found, folder / f"{key}-{rank}.safetensors")
    facts = {"spread": sorted(n for n, p in trained(model).items() if isinstance(p, DTensor))}
    if facts["spread"]:
        facts["wrote"] = written(handle(model, spec), folder / f"{key}-saved")
        assert len(facts["spread"]) == len(trained(model)), "shards must be back in their places"
    return facts


def handle(model: nn.Module, spec: Any) -> Adapter:
    """The handle that `adapt` gave."""
    return Adapter(model, "default", [inlay.core.building.place(spec)], (), torch.float32, [], {}, 0)


def written(adapter: Adapter, folder: Path) -> bool:
    """Save; whether this process was the one to write."""
    calls: list[Path] = []
    write = checkpoint.write_text
    checkpoint.write_text = lambda path, text: calls.append(path) or write(path, text)
    try:
        adapter.save(folder)
    finally:
        checkpoint.write_text = write
    assert (folder / checkpoint.TENSORS).exists(), "no process returns before the files are there"
    return bool(calls)


def rounded(rank: int, folder: Path) -> dict:
    """A forward in bfloat16 leaves rounded tensors in place; what is saved must be the trained ones."""
    model = adapted("lora(r=2)")
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    feed = share(benches()["classifier"].feed(), rank, "classifier")
    train(model, feed, steps=1)
    exact = copied(trained(model).items())
    with torch.no_grad():
        loss_of(model, feed)
    held = {str(p.dtype) for n, p in model.named_parameters() if n.startswith("inlay.")}
    handle(model, "lora(r=2)").save(folder / "rounded-saved")
    if rank == 0:
        save_file({n: t.contiguous() for n, t in exact.items()}, folder / "rounded.safetensors")
    return {"held": sorted(held)}


def refusals(folder: Path) -> dict:
    """What cannot be done with a model that is spread over processes, and why."""
    spread = sharded(adapted("lora(r=2)"))
    trials: dict[str, Callable[[], Any]] = {
        "adapt": lambda: inlay.adapt(spread, "ia3", name="late"),
        "load": lambda: inlay.load(spread, folder / "rounded-saved", name="late"),
        "merge": lambda: handle(spread, "lora(r=2)").merge(),
        "wrapped": lambda: inlay.adapt(DistributedDataParallel(adapted("lora(r=2)")), "ia3", name="late"),
    }
    found = {}
    for name, trial in trials.items():
        try:
            trial()
        except InlayError as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["names"] = inlay.core.active.attached(spread).names()
    return found


def main(rank: int, folder: Path) -> None:
    warnings.simplefilter("error", UserWarning)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE)}
    os.environ["MASTER_ADDR"] = "localhost"  # accelerate wants all of these, though it finds the processes connected
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    jobs = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))
    facts: dict[str, Any] = {key: job(rank, folder, key, *rest) for key, *rest in jobs}
    facts["rounded"] = rounded(rank, folder)
    facts["refused"] = refusals(folder)
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
