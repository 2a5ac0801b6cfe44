"""Methods for state spaces on Mamba: the papers' counts, the equation, both modes of the recurrence, the choice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import inlay
from inlay.core.active import attached
from inlay.core.errors import AdapterError, CalibrationError, OptionError, SiteError
from inlay.methods import SDT, Full, LoRA, StateOffset
from inlay.plan import plan
from laws.cases import stir

pytestmark = pytest.mark.filterwarnings("ignore:.*falling back to its reference")
PROJECTIONS = ["mixer.in", "mixer.x", "mixer.out"]
SPARSE = SDT(freeze_channels=0.9, freeze_states=0.5, r=2)
METHODS = {
    "h": StateOffset(),
    "y": StateOffset(offset="y"),
    "low rank": StateOffset(r=2),
    "sdt": SPARSE,
    "lora": LoRA(r=2).on(*PROJECTIONS),
    "both": [LoRA(r=2).on(*PROJECTIONS), StateOffset()],
}


def mamba(seed: int = 3) -> Any:
    torch.manual_seed(seed)
    config = transformers.MambaConfig(
        vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.5
    )
    return transformers.MambaForCausalLM(config).eval()


def batch(rows: int = 3, tokens: int = 9, pad: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(1, 40, (rows, tokens), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def close(a: Tensor, b: Tensor, tolerance: float = 2e-6) -> None:
    assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


# ---------------------------------------------------------------------- counts
@pytest.mark.parametrize(
    ("method", "where", "count"),
    [
        ("stateoffset", None, 589_824),
        ("stateoffset(offset='y')", None, 36_864),
        ("stateoffset(r=4)", None, 24 * 4 * (1536 + 16)),
        ("sdt", None, 454_608),
        ("sdt", ["block[0]"], None),
        ("sdt(r=0)", ["mixer.A"], 24 * 30),
        ("sdt(r=0)", ["mixer.B", "mixer.C"], 24 * 480),
        ("lora", ["mixer.out"], 24 * 18_432),
        ("lora(r=8)", PROJECTIONS, 24 * 8 * ((768 + 3072) + (1536 + 80) + (1536 + 768))),
    ],
)
def test_counts_on_mamba_130m(method: str, where: list[str] | None, count: int | None) -> None:
    """Of 1,536 channels 15 are chosen (1,520.64 are frozen, rounded), and of 16 states 2."""
    if count is None:
        with pytest.raises(SiteError, match="leave `where` out"):
            plan("mamba-130m", method, where, memory=False)
        return
    found = plan("mamba-130m", method, where, memory=False)
    assert found.adapter_parameters == count
    assert found.base_parameters == 129_135_360


def test_the_share_of_the_paper() -> None:
    """0.45 % and 0.03 % of Mamba-130M, and 0.35 % for SDT."""
    shares = [plan("mamba-130m", m, None, memory=False).adapter_parameters / 129_135_360
              for m in ("stateoffset", "stateoffset(offset='y')", "sdt")]  # fmt: skip
    assert [round(100 * share, 2) for share in shares] == [0.46, 0.03, 0.35]


def test_lora_on_the_projections_is_pefts() -> None:
    """PEFT refuses Mamba's out_proj, as its kernels read that weight past the layer."""
    theirs = peft.get_peft_model(mamba(), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["in_proj", "x_proj"]))
    model = mamba()
    adapter = inlay.adapt(model, LoRA(r=2, alpha=2), ["mixer.in", "mixer.x"])
    assert theirs.get_nb_trainable_parameters()[0] == adapter.adapter_parameters
    stir(adapter)
    own = dict(model.named_modules())["inlay"].adapters["default"]
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            path = name.removeprefix("base_model.model.").partition(".lora_")[0]
            p.data.copy_(own[path.replace(".", "/")].get_parameter(name.partition("lora_")[2][0]).detach())
    close(logits(model, batch()), logits(theirs.eval(), batch()))


# ---------------------------------------------------------------------- the equation
def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def by_hand(model: Any, ids: Tensor, h: list[Tensor], y: list[Tensor]) -> Tensor:
    """Mamba token by token in float64, with h′ and y′ of each layer where the paper has them."""
    own = {n: p.detach().double() for n, p in model.named_parameters() if not n.startswith("inlay.")}
    x = own["backbone.embeddings.weight"][ids]
    for i in range(2):
        p = {n.removeprefix(f"backbone.layers.{i}."): t for n, t in own.items()}
        u, z = (norm(x, p["norm.weight"]) @ p["mixer.in_proj.weight"].T).chunk(2, -1)
        kernel, before = p["mixer.conv1d.weight"][:, 0], F.pad(u, (0, 0, 3, 0))
        u = F.silu(sum(before[:, k : k + u.shape[1]] * kernel[:, k] for k in range(4)) + p["mixer.conv1d.bias"])
        dt, B, C = (u @ p["mixer.x_proj.weight"].T).split([1, 4, 4], -1)
        dt = F.softplus(dt @ p["mixer.dt_proj.weight"].T + p["mixer.dt_proj.bias"])
        A, state, steps = -p["mixer.A_log"].exp(), torch.zeros(len(ids), 32, 4, dtype=torch.float64), []
        for t in range(u.shape[1]):
            state = (dt[:, t, :, None] * A).exp() * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            read = ((state + h[i]) * C[:, t, None]).sum(-1) + p["mixer.D"] * u[:, t] + y[i]
            steps.append(read * F.silu(z[:, t]))
        x = x + torch.stack(steps, 1) @ p["mixer.out_proj.weight"].T
    return norm(x, own["backbone.norm_f.weight"]) @ own["backbone.embeddings.weight"].T


@pytest.mark.parametrize("method", [StateOffset(), StateOffset(offset="y"), StateOffset(r=2)], ids=str)
def test_offsets_are_those_of_the_equation(method: StateOffset) -> None:
    model, inputs = mamba(), batch()
    adapter = inlay.adapt(model, method)
    stir(adapter)
    built: list[Any] = [level.method for level in adapter.levels]
    zero, moved = [torch.zeros(())] * 2, [(m.B @ m.A if method.r else m.value).detach().double() for m in built]
    h, y = (moved, zero) if method.offset == "h" else (zero, moved)
    close(logits(model, inputs), by_hand(model, inputs["input_ids"], h, y), 1e-5)
    assert (logits(model, inputs) - by_hand(model, inputs["input_ids"], zero, zero)).abs().max() > 1e-2


# ---------------------------------------------------------------------- two modes, caches, padding
@pytest.mark.parametrize("name", METHODS)
def test_steps_with_a_cache_are_the_scan(name: str) -> None:
    model, inputs = mamba(), batch()
    stir(inlay.adapt(model, METHODS[name]))
    whole, cache, steps = logits(model, inputs), None, []
    with torch.no_grad():
        for t in range(inputs["input_ids"].shape[1]):
            out = model(input_ids=inputs["input_ids"][:, t : t + 1], cache_params=cache, use_cache=True)
            cache = out.cache_params
            steps.append(out.logits)
    close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("name", METHODS)
def test_generation_with_and_without_a_cache(name: str) -> None:
    model, prompt = mamba(), batch(pad=4)
    stir(inlay.adapt(model, METHODS[name]))
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = model.generate(**prompt, use_cache=True, **asked)
    assert torch.equal(with_cache, model.generate(**prompt, use_cache=False, **asked))
    alone = model.generate(prompt["input_ids"][:1, 4:], use_cache=True, **asked)
    assert torch.equal(alone[0, 5:], with_cache[0, 9:]), "padding before a prompt changes what follows"
    inlay.use(model)
    assert not torch.equal(with_cache, model.generate(**prompt, use_cache=True, **asked)), "the adapter does nothing"


@pytest.mark.parametrize("name", ["sdt", "lora"])
def test_generation_after_a_merge(name: str) -> None:
    model, prompt = mamba(), batch()
    adapter = inlay.adapt(model, METHODS[name])
    stir(adapter)
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(**prompt, **asked)
    adapter.merge()
    assert torch.equal(before, model.generate(**prompt, **asked))


def test_two_offsets_and_routed_rows_with_a_cache() -> None:
    model, prompt = mamba(), batch()
    for name, method in (("h", StateOffset()), ("y", StateOffset(offset="y"))):
        stir(inlay.adapt(model, method, name=name))
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    names = ["h", None, "y"]
    with inlay.route(model, names):
        routed = model.generate(**prompt, use_cache=True, **asked)
    for i, name in enumerate(names):
        inlay.use(model, *([] if name is None else [name]))
        alone = model.generate(prompt["input_ids"][i : i + 1], use_cache=True, **asked)
        assert torch.equal(alone[0], routed[i]), name
    inlay.use(model, "h", "y")
    both = logits(model, prompt)
    inlay.delete(model, "y")
    assert not torch.equal(both, logits(model, prompt))
    inlay.use(model, "h")
    assert {path for path, _ in attached(model).ears} == {
        f"backbone.layers.{i}.mixer.{m}" for i in range(2) for m in ("in_proj", "x_proj")
    }


# ---------------------------------------------------------------------- hearing
def gradients(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_blocks_hear_again(reentrant: bool) -> None:
    model, inputs = mamba().train(), batch()
    stir(inlay.adapt(model, METHODS["both"]))
    wanted = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for a, b in zip(gradients(model, inputs), wanted, strict=True):
        close(a, b, 1e-5)  # the first of two forwards is without gradients, on a path of its own
    assert all(ear.value is None for ear in attached(model).ears.values()), "an activation was kept"


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in transformers' own scan
def test_compiles_into_one_graph() -> None:
    model, inputs = mamba(), batch()
    model.config.use_cache = False
    stir(inlay.adapt(model, METHODS["both"]))
    wanted = logits(model, inputs)
    torch._dynamo.reset()
    close(logits(torch.compile(model, fullgraph=True, backend="eager"), inputs), wanted)
    assert all(ear.value is None for ear in attached(model).ears.values())
    torch._dynamo.reset()


def test_a_kernel_that_passes_the_method_by_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = mamba(), batch()
    inlay.adapt(model, StateOffset())
    mixer = model.backbone.layers[1].mixer

    def fused(hidden_states: Tensor, **rest: Any) -> Tensor:
        u, z = mixer.in_proj(hidden_states).chunk(2, -1)
        return F.linear(u * F.silu(z), mixer.out_proj.weight)

    monkeypatch.setattr(mixer, "forward", fused)
    with pytest.raises(AdapterError, match=r"layers\.1\.mixer\.out_proj' was not called in this forward"):
        logits(model, inputs)
    with inlay.disabled(model):
        logits(model, inputs)


@pytest.mark.parametrize(
    ("method", "where", "reason"),
    [
        (StateOffset(), ["mixer.in"], "acts where 'mixer.out' reads its input"),
        (SDT(r=0), ["mixer.x"], "chooses channels of a state space, at mixer.A, mixer.B, mixer.C"),
    ],
)
def test_other_places_are_refused(method: Any, where: list[str], reason: str) -> None:
    with pytest.raises(SiteError, match=reason):
        inlay.adapt(mamba(), method, where)
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(SiteError, match="is for the architecture 'mamba', and this BertModel is none"):
        inlay.adapt(transformers.BertModel(config), method, where)


# ---------------------------------------------------------------------- the choice of SDT
def loss_of(out: Any, batch: Any) -> Tensor:
    return out.loss


def labelled() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in batch(6)["input_ids"].split(2)]


def built(adapter: inlay.Adapter, role: str) -> list[Any]:
    return [level.method for level in adapter.levels if level.site.role(role)]


def test_the_most_important_are_chosen() -> None:
    """Channels by the squared summed gradient of log A over their states, and in each its best states."""
    plain, model = mamba(), mamba()
    for each in labelled():
        plain(**each).loss.backward()
    adapter = inlay.adapt(model, SPARSE)
    before = logits(model, batch())
    inlay.calibrate(model, labelled())
    assert torch.equal(before, logits(model, batch())), "the choice itself changes nothing"
    for i, (a, b, c) in enumerate(zip(*(built(adapter, f"mixer.{x}") for x in "ABC"), strict=True)):
        score = plain.backbone.layers[i].mixer.A_log.grad.double().square()
        best = sorted(range(32), key=lambda ch, s=score: -float(s[ch].sum()))[:3]  # round(28.8) of 32 are frozen
        assert a.channels.tolist() == b.channels.tolist() == c.channels.tolist() == sorted(best)
        for channel, states in zip(a.channels.tolist(), a.numbers.tolist(), strict=True):
            assert states == sorted(sorted(range(4), key=lambda n, row=score[channel]: -float(row[n]))[:2])
        assert b.numbers.tolist() == [[0, 1, 2, 3]] * 3


def test_what_was_not_chosen_stays(tmp_path: Path) -> None:
    """After training and a merge all other numbers are bit for bit the base's; files hold the chosen ones alone."""
    model, old = mamba(), mamba()
    adapter = inlay.adapt(model, SPARSE)
    inlay.calibrate(model, labelled())
    optimizer = inlay.optimizer(adapter)
    for each in labelled():
        model(**each).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.save(str(tmp_path))
    again = mamba()
    inlay.load(again, tmp_path)
    assert torch.equal(logits(model, batch()), logits(again, batch()))
    sizes = {name: p.numel() for name, p in again.named_parameters() if name.startswith("inlay.")}
    assert sum(sizes.values()) == adapter.adapter_parameters == 2 * (3 * 2 + 2 * 3 * 4 + 2 * (32 + 16))
    adapter.merge()
    for i in range(2):
        (a,) = (m for m in built(adapter, "mixer.A") if m.site.depth == i)
        chosen = torch.zeros(32, 4, dtype=torch.bool)
        chosen[a.channels[:, None], a.numbers] = True
        new, before = (m.backbone.layers[i].mixer for m in (model, old))
        assert torch.equal(new.A_log.ne(before.A_log), chosen)
        rows = torch.zeros(9, 32, dtype=torch.bool)
        rows[1:, a.channels] = True
        assert torch.equal(new.x_proj.weight.ne(before.x_proj.weight), rows)
        assert torch.equal(new.dt_proj.weight, before.dt_proj.weight)


def test_projections_alone_choose_for_themselves_and_nothing_is_chosen_from_nothing() -> None:
    model = mamba()
    adapter = inlay.adapt(model, SDT(r=0, freeze_channels=0.9), ["mixer.B"])
    assert [m.channels.tolist() for m in built(adapter, "mixer.B")] == [[0, 10, 21]] * 2, "spread evenly without data"
    inlay.calibrate(model, labelled())
    plain = mamba()
    for each in labelled():
        plain(**each).loss.backward()
    for i, m in enumerate(built(adapter, "mixer.B")):
        score = plain.backbone.layers[i].mixer.x_proj.weight.grad[1:5].square().sum(0)
        assert m.channels.tolist() == score.topk(3).indices.sort().values.tolist()
    nothing = mamba()
    nothing.backbone.layers[1].mixer.out_proj.weight.data.zero_()
    inlay.adapt(nothing, SPARSE)
    with pytest.raises(CalibrationError, match=r"layers\.1\.mixer\.A_log': nothing could be chosen"):
        inlay.calibrate(nothing, labelled())


# ---------------------------------------------------------------------- names
def test_places_within_the_mixer() -> None:
    """`mixer.C` and the like go by their own names: a glob does not count their matrices twice."""
    model: nn.Module = mamba()
    everything = inlay.adapt(model, LoRA(r=1), ["mixer.in", "mixer.x", "mixer.out"])
    inlay.detach(model)
    assert len(everything.placements) == 1
    for name, shape in {"u": (32, 16), "z": (32, 16), "A": (32, 4), "B": (4, 32), "C": (4, 32)}.items():
        adapter = inlay.adapt(model, LoRA(r=1), [f"block[1].mixer.{name}"])
        assert [level.site.shape for level in adapter.levels] == [shape]
        stir(adapter)
        adapted = logits(model, batch())
        adapter.merge()
        close(logits(model, batch()), adapted)
        inlay.detach(model)
    copy = inlay.adapt(model, Full(), ["mixer.A"])
    assert copy.adapter_parameters == 2 * 32 * 4
    with pytest.raises(OptionError):
        StateOffset(offset="x")
    assert math.isfinite(float(logits(model, batch()).sum()))
