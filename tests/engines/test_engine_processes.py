"""Two processes, DDP and FSDP2 over gloo: the steps that one process takes on the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_steps import KINDS, Run, adapted, close, same, train
from safetensors.torch import load_file
from torch import Tensor

import inlay
from inlay.core.companion import Companion
from inlay.core.method import method_from
from laws.benches import benches, run
from laws.cases import methods, model_of, places

WORKER = Path(__file__).with_name("engine_worker.py")
EDITS = "loreft(r=2, positions='f2+l1')"
Job = tuple[str, str, str, Any, list[str] | None]


@dataclass
class Launch:
    """What two processes left behind."""

    folder: Path
    jobs: dict[str, Job]
    facts: list[dict[str, Any]]

    def run(self, key: str) -> list[Run]:
        """The steps of both processes."""
        return [read(load_file(self.folder / f"{key}-{rank}.safetensors")) for rank in range(2)]

    def check(self, key: str) -> None:
        """Both processes hold the tensors that one process gets from the whole batch."""
        _, bench, engine, spec, where = self.jobs[key]
        wanted = train(adapted(method_from(spec), bench, where=where), benches()[bench].feed())
        found = self.run(key)
        mean = [torch.stack(losses).mean() for losses in zip(*(r.losses for r in found), strict=True)]
        for r in found:
            r.losses = mean
            same(r, wanted)
        held = [set(facts[key]["spread"]) for facts in self.facts]
        assert held == [set(wanted.parameters) if "fsdp" in engine else set()] * 2

    def check_saved(self, key: str) -> None:
        """What the first process wrote loads into a plain model that gives the trained model's outputs."""
        _, bench, _, spec, where = self.jobs[key]
        assert [facts[key]["wrote"] for facts in self.facts] == [True, False]
        plain, loaded = adapted(method_from(spec), bench, where=where).eval(), model_of(benches()[bench]).eval()
        before = output(plain, bench)
        parameters = dict(plain.named_parameters())
        with torch.no_grad():
            for name, t in self.run(key)[0].parameters.items():
                parameters[name].copy_(t)
        inlay.load(loaded, self.folder / f"{key}-saved")
        assert not output(plain, bench).equal(before), "training must have changed the output"
        close("output", output(loaded, bench), output(plain, bench), 1e-6)


@torch.no_grad()
def output(model: Any, bench: str) -> Tensor:
    return run(model, benches()[bench].feed())


def read(tensors: dict[str, Tensor]) -> Run:
    found = Run(losses=[tensors[f"loss.{k}"] for k in range(3)])
    for part in ("gradients", "parameters", "start"):
        getattr(found, part).update({n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{part}.")})
    return found


def launch(folder: Path, jobs: Sequence[Job], seconds: float = 120) -> Launch:
    """Two workers, which meet at a file; a worker that fails or hangs ends both."""
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    logs = [(folder / f"log-{rank}.txt").open("w+", encoding="utf-8") for rank in range(2)]
    paths = os.pathsep.join([str(WORKER.parents[1]), str(WORKER.parent)])
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(folder)],
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [worker.wait(seconds) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        said = ["".join(log.seek(0) or log.readlines()[-30:]) for log in logs]
        for log in logs:
            log.close()
    assert codes == [0, 0], "\n".join(said)
    facts = [json.loads((folder / f"facts-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    return Launch(folder, {job[0]: job for job in jobs}, facts)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    jobs = [(f"{engine}-{kind}", "classifier", engine, spec, None)
            for engine in ("ddp", "fsdp") for kind, spec in KINDS.items()]  # fmt: skip
    jobs += [(name, "classifier", name, KINDS["weight"], None) for name in ("accelerate", "accelerate-fsdp", "apart")]
    jobs += [(name, "bert", name, EDITS, ["mlp.down"]) for name in ("ddp-recomputed", "fsdp-recomputed")]
    return launch(tmp_path_factory.mktemp("kinds"), jobs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_same_steps(kinds: Launch, engine: str, kind: str) -> None:
    kinds.check(f"{engine}-{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_from_shards(kinds: Launch, kind: str) -> None:
    kinds.check_saved(f"fsdp-{kind}")


@pytest.mark.parametrize("key", ["accelerate", "accelerate-fsdp", "ddp-recomputed", "fsdp-recomputed"])
def test_prepared_by_accelerate_or_recomputed(kinds: Launch, key: str) -> None:
    kinds.check(key)


def test_processes_that_do_not_speak_are_seen(kinds: Launch) -> None:
    with pytest.raises(AssertionError, match="differs by"):
        kinds.check("apart")


def test_saved_exactly_though_the_forward_rounds(kinds: Launch) -> None:
    assert kinds.facts[0]["rounded"]["held"] == ["torch.bfloat16"], "the test needs rounded tensors in place"
    model = model_of(benches()["classifier"])
    inlay.load(model, kinds.folder / "rounded-saved")
    found = {n: p for n, p in model.named_parameters() if n.startswith("inlay.")}
    wanted = load_file(kinds.folder / "rounded.safetensors")
    assert found.keys() == wanted.keys()
    assert all(p.equal(wanted[n]) for n, p in found.items())
    assert not all(t.equal(t.bfloat16().float()) for t in wanted.values())


def test_refused_on_a_model_that_is_spread(kinds: Launch) -> None:
    refused = kinds.facts[0]["refused"]
    for name in ("adapt", "load"):
        assert "attach adapters first, then call fully_shard" in refused[name]
    assert "merge it where one process holds the model" in refused["merge"]
    assert "before DistributedDataParallel wraps it" in refused["wrapped"]
    assert refused["names"] == ["default"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("bench", ["classifier", "llama"])
def test_every_method(tmp_path: Path, engine: str, bench: str) -> None:
    jobs: list[Job] = []
    for k, method in enumerate(methods()):
        where = places(method, benches()[bench])
        if isinstance(method, Companion):  # see test_engine_governed.py
            continue
        if where is not None and not (bench == "llama" and method.specification()["method"] == "bitfit"):
            jobs.append((f"{engine}-{k}", bench, engine, method.specification(), list(where) or None))
    launched = launch(tmp_path, jobs, 300)
    for key in launched.jobs:
        launched.check(key)
        if engine == "fsdp":
            launched.check_saved(key)
