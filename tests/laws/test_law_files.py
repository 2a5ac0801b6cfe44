"""Law 7: saved in one process, loaded in another, bit for bit; anything else than what was saved is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay.core import checkpoint, files
from inlay.core.checkpoint import DESCRIPTION, TENSORS
from inlay.core.errors import AdapterError, CheckpointError
from inlay.methods import BitFit, DoRA, LoRA, VeRA
from laws.benches import benches
from laws.cases import Case, methods, model_of, places, stir
from laws.checks import anatomy_of, output, same_anatomy
from laws.refusals import refused as refusal

BENCHES = ("linear", "conv2d-groups", "gpt2-qv", "mha", "gpt-oss", "int8-tensor", "mamba", "classifier")
THERE = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import inlay
from pathlib import Path
from laws.benches import benches
from laws.cases import model_of
from laws.checks import output
outputs = {}
for folder in sorted(Path(sys.argv[2]).iterdir()):
    bench = benches()[folder.name.split("--")[0]]
    model = model_of(bench)
    inlay.load(model, folder)
    outputs[folder.name] = output(model, bench.feed())
    assert output(model, bench.feed()).isfinite().all()
torch.save(outputs, sys.argv[3])
"""


def test_new_process(tmp_path: Path) -> None:
    """Every method, on benches of several kinds, one process for all."""
    expected, folders = {}, tmp_path / "adapters"
    for name in BENCHES:
        bench = benches()[name]
        for i, method in enumerate(methods()):
            case = Case(method, bench)
            if places(method, bench) is None or refusal(case):
                continue
            model = model_of(bench)
            adapter = case.attach(model)
            stir(adapter)
            key = f"{name}--{i:02d}-{method.name()}"
            adapter.save(str(folders / key))
            expected[key] = output(model, bench.feed())
    assert len(expected) > 60
    there = subprocess.run(
        [sys.executable, "-c", THERE, str(Path(__file__).parents[1]), str(folders), str(tmp_path / "found.pt")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert there.returncode == 0, there.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    wrong = [key for key, out in expected.items() if not torch.equal(out, found[key])]
    assert found.keys() == expected.keys()
    assert not wrong


# ---------------------------------------------------------------------- damage
@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = model_of(benches()["linear"])
    adapter = inlay.adapt(model, LoRA(r=3), ("up", "down"))
    stir(adapter)
    adapter.save(str(tmp_path / "a"), task="a test")
    return tmp_path / "a"


def refused(folder: Path, match: str, model: nn.Module | None = None, error: type[Exception] = CheckpointError) -> None:
    """Loading raises, and leaves the model as it was."""
    model = model or model_of(benches()["linear"])
    before = anatomy_of(model)
    with pytest.raises(error, match=match):
        inlay.load(model, folder)
    same_anatomy(before, anatomy_of(model), "a refused load")


def rewritten(folder: Path, change) -> None:
    """The tensors' file with other tensors and a description, signed as inlay signs it."""
    with safe_open(folder / TENSORS, framework="pt") as file:
        document = json.loads(file.metadata()["inlay"])
    tensors = load_file(folder / TENSORS)
    document, tensors = change(document, tensors)
    document = {k: v for k, v in document.items() if k not in ("checksum", "tensors")}
    document["tensors"] = files.tensors_digest(tensors)
    document["checksum"] = files.sha256(files.canonical(document))
    save_file(tensors, folder / TENSORS, metadata={"inlay": files.canonical(document)})
    (folder / DESCRIPTION).unlink()


def test_loads_as_saved(saved: Path) -> None:
    model = model_of(benches()["linear"])
    adapter = inlay.load(model, saved, name="other")
    assert adapter.name == "other"
    assert sorted(os.listdir(saved)) == [DESCRIPTION, TENSORS]
    assert json.loads((saved / DESCRIPTION).read_text())["about"] == {"task": "a test"}


@pytest.mark.parametrize("keep", [0, 7, 200, 0.5, 0.999])
def test_truncated(saved: Path, keep: float) -> None:
    data = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    refused(saved, "truncated or damaged|not written by inlay")


def test_every_byte_counts(saved: Path) -> None:
    """A bit flipped anywhere in the file is found, in the header as in the tensors."""
    data = (saved / TENSORS).read_bytes()
    for at in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 1]:
        flipped = bytearray(data)
        flipped[at] ^= 1
        (saved / TENSORS).write_bytes(bytes(flipped))
        refused(saved, ".")


def test_tampered_description(saved: Path) -> None:
    document = json.loads((saved / DESCRIPTION).read_text())
    document["sites"][0]["method"]["alpha"] = 80.0
    (saved / DESCRIPTION).write_text(json.dumps(document))
    refused(saved, "changed after saving")
    (saved / DESCRIPTION).write_text("{")
    refused(saved, "not JSON")
    (saved / DESCRIPTION).write_text("[1]")
    refused(saved, "does not describe an adapter")
    (saved / DESCRIPTION).unlink()  # the tensors' file is complete by itself
    inlay.load(model_of(benches()["linear"]), saved)


def test_missing_and_extra_tensors(saved: Path) -> None:
    kept = shutil.copytree(saved, saved.parent / "b")
    rewritten(saved, lambda d, t: (d, {k: v for k, v in t.items() if k != "up.A"}))
    refused(saved, "lacks the tensor 'up.A'")
    rewritten(kept, lambda d, t: (d, t | {"up.C": torch.zeros(2)}))
    refused(kept, "no place for: up.C")


def test_other_shapes_of_tensors(saved: Path) -> None:
    rewritten(saved, lambda d, t: (d, t | {"up.A": torch.zeros(4, 8)}))
    refused(saved, r"'up.A' is \(4, 8\), the model needs \(3, 8\)")


def test_other_formats(saved: Path) -> None:
    kept = shutil.copytree(saved, saved.parent / "b")
    rewritten(saved, lambda d, t: (d | {"format": "inlay/99"}, t))
    refused(saved, "format 'inlay/99'")
    save_file(load_file(kept / TENSORS), kept / TENSORS)
    refused(kept, "not written by inlay")
    refused(saved.parent / "nowhere", "no such folder")


def test_unknown_method(saved: Path) -> None:
    def newer(d: dict, t: dict) -> tuple[dict, dict]:
        for site in d["sites"]:
            site["method"]["method"] = "loraz"
        return d, t

    rewritten(saved, newer)
    refused(saved, "unknown method 'loraz'; did you mean 'lora'")


def test_other_base(saved: Path) -> None:
    other = model_of(benches()["linear"])
    with torch.no_grad():
        other.up.weight[0, 0] += 0.01
    refused(saved, "another base", other)
    inlay.load(other, saved, any_base=True)
    wider = nn.Module()
    wider.up, wider.down = nn.Linear(8, 13), nn.Linear(13, 8)
    refused(saved, r"was \[12, 8\], here it is \[13, 8\]", wider)
    refused(saved, "does not have", nn.Sequential(nn.Linear(2, 2)))
    refused(saved, "does not have", model_of(benches()["bert"]))


def test_a_base_in_bfloat16_is_the_same_base(saved: Path) -> None:
    inlay.load(model_of(benches()["linear"], torch.bfloat16), saved)


def test_quantised_base(tmp_path: Path) -> None:
    """An adapter of a quantised base loads on that base, not on another one, and on the dense base it came from."""
    bench = benches()["int8-tensor"]
    adapter = inlay.adapt(model_of(bench), LoRA(r=2), bench.where)
    adapter.save(str(tmp_path))
    inlay.load(model_of(bench), tmp_path)
    inlay.load(model_of(benches()["linear"]), tmp_path)  # the same shapes in float32: its own digest says nothing
    other = model_of(bench)
    other.up._parameters["weight"].scale.mul_(1.5)
    refused(tmp_path, "another base", other)


def test_names(saved: Path) -> None:
    model = model_of(benches()["linear"])
    first = inlay.load(model, saved)
    before = anatomy_of(model)
    for name, match in (("default", "attached already"), ("a.b", "cannot name"), ("", "attached already")):
        with pytest.raises(AdapterError, match=match):
            inlay.load(model, saved, name=name)
    same_anatomy(before, anatomy_of(model), "refused names")
    assert model.inlay.active == [first.name]


def test_a_refused_load_keeps_the_active_adapter(saved: Path) -> None:
    model = model_of(benches()["linear"])
    inlay.adapt(model, BitFit(), name="mine")
    rewritten(saved, lambda d, t: (d, t | {"up.C": torch.zeros(2)}))
    with pytest.raises(CheckpointError):
        inlay.load(model, saved)
    assert model.inlay.active == ["mine"]
    assert list(model.inlay.adapters) == ["mine"]
    assert all(p.requires_grad for p in model.inlay.adapters["mine"].parameters())


# ---------------------------------------------------------------------- kills and writers
@pytest.mark.parametrize("killed", [TENSORS, DESCRIPTION])
def test_killed_while_saving(saved: Path, killed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before either of the two renames leaves an adapter that loads: the old one, or the new one."""
    model = model_of(benches()["linear"])
    adapter = inlay.load(model, saved)
    old = output(model, benches()["linear"].feed())
    stir(adapter, 9)
    new = output(model, benches()["linear"].feed())
    real = os.replace

    class Killed(BaseException):
        pass

    def dying(source: str, place: str) -> None:
        if Path(place).name == killed:
            raise Killed
        real(source, place)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        adapter.save(str(saved))
    monkeypatch.setattr(os, "replace", real)
    assert not [name for name in os.listdir(saved) if name.startswith(".")], "temporary files were left"
    again = model_of(benches()["linear"])
    inlay.load(again, saved)
    expected = old if killed == TENSORS else new
    assert torch.equal(expected, output(again, benches()["linear"].feed()))


def test_killed_for_real(saved: Path) -> None:
    """SIGKILL at the moment of the second rename, in a process of its own."""
    code = f"""
import os, signal, sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import inlay
from laws.benches import benches
from laws.cases import model_of, stir
model = model_of(benches()["linear"])
adapter = inlay.load(model, {str(saved)!r})
stir(adapter, 9)
real = os.replace
def dying(source, place):
    if str(place).endswith(".json"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, place)
os.replace = dying
adapter.save({str(saved)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    model = model_of(benches()["linear"])
    stir(inlay.load(model, saved), 9)  # what is there loads, and can be saved over
    checkpoint.save(inlay.load(model, saved, name="again"), saved)


def test_full_disk(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(benches()["linear"])
    adapter = inlay.load(model, saved)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(inlay.core.errors.InlayError, match=r"disk .* is full"):
        adapter.save(str(saved))
    monkeypatch.undo()
    inlay.load(model_of(benches()["linear"]), saved)


# ---------------------------------------------------------------------- what files must remember
def test_places_with_sizes_of_their_own(tmp_path: Path) -> None:
    """The same specification at two placements has two sets of shared projections; a file keeps them apart."""
    bench = benches()["linear"]
    model = model_of(bench)
    adapter = inlay.adapt(model, [VeRA(r=4).on("up"), VeRA(r=4).on("down", "out")])
    stir(adapter)
    adapter.save(str(tmp_path))
    fresh = model_of(bench)
    inlay.load(fresh, tmp_path)
    assert torch.equal(output(model, bench.feed()), output(fresh, bench.feed()))
    assert model.inlay.tensors._buffers.keys() == fresh.inlay.tensors._buffers.keys()


def test_overrides(tmp_path: Path) -> None:
    bench = benches()["linear"]
    model = model_of(bench)
    adapter = inlay.adapt(model, VeRA(r=4), ("up", "down", "out"), overrides={"down": {"r": 2}})
    stir(adapter)
    adapter.save(str(tmp_path))
    fresh = model_of(bench)
    inlay.load(fresh, tmp_path)
    assert torch.equal(output(model, bench.feed()), output(fresh, bench.feed()))


def test_shared_tensors_in_full(tmp_path: Path) -> None:
    """Stored as seed and checksum, or as tensors; another draw than in training is refused."""
    bench = benches()["linear"]
    model = model_of(bench)
    adapter = inlay.adapt(model, VeRA(r=4), ("up", "down"))
    stir(adapter)
    checkpoint.save(adapter, tmp_path / "seed")
    checkpoint.save(adapter, tmp_path / "full", shared=True)
    assert (tmp_path / "full" / TENSORS).stat().st_size > (tmp_path / "seed" / TENSORS).stat().st_size
    rewritten(tmp_path / "seed", lambda d, t: (d | {"shared": dict.fromkeys(d["shared"], "0" * 64)}, t))
    refused(tmp_path / "seed", "drawn from its seed differs")
    rewritten(tmp_path / "full", lambda d, t: (d, {k: v * 2 if k.startswith("shared.") else v for k, v in t.items()}))
    doubled = model_of(bench)
    inlay.load(doubled, tmp_path / "full", name="doubled")
    other = model_of(bench)
    inlay.adapt(other, VeRA(r=4), ("up", "down"), name="drawn")
    before = output(other, bench.feed())
    with pytest.raises(CheckpointError, match="attached adapter uses another"):
        inlay.load(other, tmp_path / "full", name="doubled")
    assert torch.equal(before, output(other, bench.feed()))


def test_saving_while_merged(tmp_path: Path) -> None:
    model = model_of(benches()["linear"])
    adapter = inlay.adapt(model, DoRA(), ("up",))
    stir(adapter)
    adapter.merge()
    with pytest.raises(CheckpointError, match="unmerge first"):
        adapter.save(str(tmp_path))
    adapter.unmerge()
    adapter.save(str(tmp_path))
