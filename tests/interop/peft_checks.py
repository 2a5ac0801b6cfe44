"""PEFT itself as the oracle: folders it wrote are read, folders inlay wrote are loaded by it, logits must agree."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from peft_bases import BASES, Base
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay.interop.peft import read, write

TOLERANCE = 1e-5
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
"""Written in any case, so that the folder reads the same with every version of torch."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's own warnings, which the suite would make errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def perturb(model: nn.Module, scale: float = 0.2) -> None:
    """Move every trained tensor away from its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += scale * torch.randn_like(p)


def peft_folder(base: Base, config: peft.PeftConfig, folder: Path) -> tuple[Tensor, int]:
    """A folder that PEFT wrote with non-zero weights: (its output, its trainable count)."""
    with quiet():
        model = peft.get_peft_model(base(), config)
        perturb(model)
        model.save_pretrained(str(folder))
        model.eval()
        return base.output(model), sum(p.numel() for p in model.parameters() if p.requires_grad)


def peft_output(base: Base, folder: Path) -> Tensor:
    """What PEFT computes from a folder; no tensor of it may be missing, unknown or left unused."""
    with quiet():
        model = peft.PeftModel.from_pretrained(base(), str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
        result = set_peft_model_state_dict(model, weights)
        kind = model.peft_config["default"].peft_type
        prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.get(kind) or "\0"
        missing = {k for k in result.missing_keys if prefix in k or "modules_to_save" in k}
        held = dict(model.named_parameters(remove_duplicate=False))
        given = {id(p) for k, p in held.items() if k not in missing}  # VB-LoRA's bank is listed at every module
        assert all(id(held.get(k)) in given for k in missing), missing
        assert set(result.unexpected_keys) <= {"prompt_embeddings"}  # PEFT loads it past load_state_dict
        saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        assert set(saved) <= set(weights) | {k for k in saved if ".original_module." in k or ".modules_to_save." in k}
        for name in set(saved) & set(weights):  # PEFT takes logarithms of VB-LoRA's compact weights and back
            rounded = 1e-6 if name.endswith("topk_weights") else 0
            torch.testing.assert_close(saved[name], weights[name], atol=rounded, rtol=rounded, check_dtype=False)
        return base.output(model.eval())


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE)


def both_ways(base: Base, config: peft.PeftConfig, tmp: Path, same: bool = True) -> inlay.Adapter:
    """PEFT → inlay → PEFT: equal outputs at each step; returns inlay's adapter.

    At the end the tensors are bit-equal, unless PEFT's are not all that counts (`same=False`).
    """
    expected, count = peft_folder(base, config, tmp / "theirs")
    plain = base()
    untouched = base.output(plain)
    assert not torch.allclose(expected, untouched, atol=1e-3), "the perturbed adapter does nothing: a void test"
    adapter = inlay.load(plain, tmp / "theirs")
    close(base.output(plain), expected)
    assert not same or adapter.adapter_parameters + adapter.head_parameters == count
    with inlay.disabled(plain):
        assert torch.equal(base.output(plain), untouched)

    write(adapter, tmp / "ours")
    close(peft_output(base, tmp / "ours"), expected)
    theirs, ours = (load_file(tmp / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    kept = {k: t for k, t in theirs.items() if not twice(k) and not base_tensor(k, plain, t)}
    assert kept.keys() <= ours.keys()
    for name, t in kept.items():
        assert torch.equal(ours[name], t) or not same, name
    assert all(name in theirs or base_tensor(name, plain, t) or name in PROJECTIONS for name, t in ours.items())

    adapter.save(str(tmp / "own"))
    again = base()
    inlay.load(again, tmp / "own")
    assert torch.equal(base.output(again), base.output(plain))
    return adapter


def twice(name: str) -> bool:
    """Biases that PEFT stores once more with bias='all'."""
    return ".original_module." in name or ".modules_to_save." in name


def base_tensor(name: str, model: nn.Module, t: Tensor) -> bool:
    """Whether a stored tensor is just one of the base's own (adapted embeddings are stored with their base)."""
    path = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".ln_tuning_layers", "")
    own = model.state_dict().get(path)
    return own is not None and torch.equal(own, t)


def adapted_here(name: str, methods: Any, where: Any, options: dict[str, Any], tmp: Path) -> None:
    """`from_inlay` of a base's name and what `inlay.adapt` is called with."""
    from_inlay(BASES[name], inlay.adapt(BASES[name](), methods, where, **options), tmp)


def from_inlay(base: Base, adapter: inlay.Adapter, tmp: Path) -> None:
    """inlay → PEFT: the folder loads there without a key too many or too few and computes the same; and back."""
    perturb(adapter.model)
    expected = base.output(adapter.model)
    write(adapter, tmp / "ours")
    close(peft_output(base, tmp / "ours"), expected)
    again = base()
    read(again, tmp / "ours")
    close(base.output(again), expected)
