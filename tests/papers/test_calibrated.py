"""Reference values of the methods that start from data: PEFT 0.21.2's EVA and CorDA, counts, what the papers claim."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

import inlay
from inlay.core.method import Method
from inlay.methods import EVA, CorDA, LoRA, LoRASB, LoRAXS, PiSSA
from inlay.plan import plan

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def llama() -> nn.Module:
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=60,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def batch(rows: int, tokens: int = 40, padded: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    weights = 1 / torch.arange(1.0, 60)  # a few words are common, as in a language
    ids = 1 + torch.multinomial(weights, rows * tokens, True, generator=generator).reshape(rows, tokens)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 25:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


@pytest.mark.parametrize(
    ("arch", "method", "where", "count"),
    [
        ("llama-7b", "corda(r=128)", ["all-linear"], 319_815_680),
        ("llama-7b", "eva(r=16)", ["all-linear"], 39_976_960),
        ("llama3-8b", "lorasb(r=96)", ["all-linear"], 2_064_384),  # the paper's Mistral has as many matrices
        ("roberta-large", "lorasb(r=24)", ["attn.q", "attn.v", "attn.o", "mlp.up", "mlp.down"], 5 * 24 * 24**2),
    ],
)
def test_counts_on_architectures(arch: str, method: str, where: list[str], count: int) -> None:
    assert plan(arch, method, where, memory=False).adapter_parameters == count


# ---------------------------------------------------------------------- PEFT
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_is_pefts(rho: float) -> None:
    """The same ranks at the same places, and the same directions, padding left out; PEFT's SVD is a randomised one."""
    data = batch(6, padded=True)
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho, use_label_mask=False)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_eva_state_dict(llama(), [data], config, show_progress_bar=False)
    model = llama()
    adapter = inlay.adapt(model, EVA(r=4, rho=rho), TARGETS, head=None)
    inlay.calibrate(model, [data] * 5)
    ours = {level.site.path: level.method.A.detach() for level in adapter.levels}
    assert {n: len(A) for n, A in ours.items()} == {n: len(A) for n, A in theirs.items()}
    assert rho == 1.0 or len({len(A) for A in ours.values()}) > 1
    for name, A in ours.items():
        alike = (A * theirs[name]).sum(1).abs()
        assert alike.min() > 0.95, f"{name}: {alike}"
        assert alike[:2].min() > 0.999, f"{name}: {alike}"


@pytest.mark.parametrize(("mode", "theirs"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_corda_is_pefts(mode: str, theirs: str) -> None:
    """The same part of W is taken out. PEFT divides inputs by their largest number, which shifts A against B alone."""
    data = batch(1, 120)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=theirs),
    )  # fmt: skip
    plain = llama()

    def forwards() -> None:
        with torch.no_grad():
            plain(**data)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preprocess_corda(plain, config, run_model=forwards)
        wrapped = peft.get_peft_model(plain, config)
    model = llama()
    adapter = inlay.adapt(model, CorDA(r=4, alpha=6, mode=mode, iterations=0), TARGETS, head=None)
    inlay.calibrate(model, [data])
    for level in adapter.levels:
        layer = wrapped.get_submodule(f"base_model.model.{level.site.path}")
        part = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        own = level.method.scale * level.method.B0 @ level.method.A0
        torch.testing.assert_close(own, part, atol=2e-3 * float(own.abs().max()), rtol=0)


@pytest.mark.parametrize("method", [EVA(r=3), CorDA(r=3), LoRASB(r=3)], ids=lambda m: m.label())
def test_written_as_a_lora_for_peft(method: Method, tmp_path) -> None:
    """Their update is of low rank, so PEFT has it too, with the rank of every place."""
    data, model = batch(4), llama()
    adapter = inlay.adapt(model, method, TARGETS, head=None)
    inlay.calibrate(model, [data] * 2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn_like(p))
        ours = model(**data).logits
        inlay.export_peft(adapter, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
        torch.testing.assert_close(theirs(**data).logits, ours, atol=1e-4, rtol=1e-3)
    again = llama()
    inlay.load(again, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**data).logits, ours, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------------- what the papers say
def losses(method: Method, data: dict[str, Tensor], rate: float, steps: int = 15) -> list[float]:
    model, found = llama(), []
    adapter = inlay.adapt(model, method, TARGETS, head=None)
    if not isinstance(method, (LoRA, LoRAXS, PiSSA)):
        inlay.calibrate(model, [data])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate, weight_decay=0)
    for _ in range(steps):
        loss = model(**data).loss
        found.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def test_lorasb_begins_one_step_on_and_learns_faster_than_loraxs() -> None:
    """The start lies lower than the base, by a step of its length; the same numbers trained go down further."""
    data = batch(8)
    with torch.no_grad():
        base = float(llama()(**data).loss)
    sb, xs = losses(LoRASB(r=8, eta=1e-3), data, 1e-2), losses(LoRAXS(r=8, alpha=8), data, 1e-2)
    assert sb[0] < base - 1e-3
    assert sb[-1] < xs[-1]


def test_the_first_step_of_lorasb_is_the_best_of_its_rank() -> None:
    """No other B A of that rank comes nearer to AdamW's step of full fine-tuning; PiSSA's and LoRA-XS' are further."""
    data, model = batch(8), llama()
    full = copy.deepcopy(model)
    full(**data).loss.backward()
    sb = inlay.adapt(model, LoRASB(r=6, eta=1.0), TARGETS, head=None)
    inlay.calibrate(model, [data])
    for level in sb.levels:
        step = -full.get_submodule(level.site.path).weight.grad.sign()
        left = (step - level.method.delta().dense().detach()).norm()
        best = torch.linalg.svdvals(step)[6:].square().sum().sqrt()
        assert float(left) == pytest.approx(float(best), rel=1e-3)
        U, _, Vh = torch.linalg.svd(level.site.weight)
        inside = U[:, :6] @ (U[:, :6].T @ step @ Vh[:6].T) @ Vh[:6]
        assert left < (step - inside).norm()


def test_knowledge_preserving_training_disturbs_what_was_shown_less() -> None:
    """CorDA's claim: after the same training, outputs on what was shown stay nearer than with the leading part."""
    shown, other = batch(8), batch(8)
    generator = torch.Generator().manual_seed(9)
    other["input_ids"] = torch.randint(30, 60, (8, 40), generator=generator)
    other["labels"] = other["input_ids"]
    with torch.no_grad():
        before = llama()(**shown).logits
    moved = {}
    for mode in ("knowledge", "instruction"):
        model = llama()
        adapter = inlay.adapt(model, CorDA(r=4, mode=mode), TARGETS, head=None)
        inlay.calibrate(model, [shown])
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0)
        for _ in range(10):
            loss = model(**other).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            moved[mode] = float((model(**shown).logits - before).norm())
    assert moved["knowledge"] < moved["instruction"]
