"""PEFT's OFT and BOFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.errors import CheckpointError
from inlay.core.hosts import ConvHost, EmbeddingHost, Host, LinearHost
from inlay.core.method import Method
from inlay.core.sites import Site
from inlay.interop.family import Part, Reading, cannot
from inlay.interop.fields import COMMON, LAYERS, STORED_TRANSPOSED, TARGETS, Field, idle, need, read
from inlay.interop.modules import Convolution, ModuleFamily, alike, grouped
from inlay.methods.weight.boft import BOFT
from inlay.methods.weight.oft import OFT
from inlay.methods.weight.rotations import skew

NEUMANN_SINCE = (0, 18)
"""The version of PEFT from which the Neumann series is what it is now."""


def overlaps(module: Convolution) -> str:
    """Why PEFT's rotated patches are no rotated kernel."""
    if all(k == 1 for k in module.kernel_size) and all(d == 1 for d in module.dilation):
        return ""
    return (
        "PEFT 0.21.2 adds overlapping patches up after it turned them, which is no rotation of the kernel (its own "
        "merged weight computes something else): 1×1 convolutions alone are alike"
    )


def not_square(module: Convolution) -> str:
    """Why the convolution that PEFT computes with its own kernel is another than the base's."""
    plain = module.padding_mode == "zeros" and all(d == 1 for d in module.dilation)
    pairs = (module.kernel_size, module.stride, module.padding)
    if plain and not any(isinstance(pair, str) or len(set(pair)) > 1 for pair in pairs):
        return ""
    return (
        "PEFT's BOFT convolves anew with one stride and one padding, of zeros, and without dilation: not as "
        f"{module} does"
    )


class OftFamily(ModuleFamily[OFT]):
    peft_type: ClassVar[str] = "OFT"
    note: ClassVar[str] = "OFT on Linear, Embedding and 1×1 Conv2d"
    fields: ClassVar[tuple[Field, ...]] = (
        *(field for field in COMMON if field.name != "peft_version"), *TARGETS, *LAYERS, STORED_TRANSPOSED,
        read("peft_version", str | None, why="before 0.18 the Neumann series was another, which is refused"),
        need("oft_block_size", int, "the tensors tell the size of blocks; before 0.14 the layout was another"),
        idle("r", "the number of blocks: the tensors tell"),
        read("module_dropout", float, 0.0, "dropout of blocks, which PEFT 0.21.2 never applies"),
        read("coft", bool, False, "constrained"), read("eps", float, 6e-5), read("block_share", bool, False, "shared"),
        read("use_cayley_neumann", bool, True), read("num_cayley_neumann_terms", int, 5, "neumann"),
        read("bias", str, "none", "'all' and 'oft_only' are BitFit beside OFT"),
        idle("init_weights", "the tensors are in the folder"),
    )  # fmt: skip
    kinds: ClassVar[tuple[type[Method], ...]] = (OFT,)
    hosts: ClassVar[tuple[type[Host], ...]] = (LinearHost, EmbeddingHost)
    convolutions: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d,)
    places: ClassVar[str] = "nn.Linear, Embedding and Conv2d"
    checks: ClassVar[tuple[Callable[[Convolution], str], ...]] = (grouped, overlaps)

    def spec(self, reading: Reading) -> OFT:
        config = reading.config
        terms = config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else 0
        if terms and version(config["peft_version"]) < NEUMANN_SINCE:
            raise CheckpointError(
                f"{reading.folder}: 'use_cayley_neumann' cannot be read from a folder of PEFT "
                f"{config['peft_version'] or 'of unknown version'}: before 0.18 the series was another"
            )
        if terms in (1, 2):
            raise CheckpointError(
                f"{reading.folder}: 'num_cayley_neumann_terms' = {terms} cannot be read: PEFT computes "
                f"{'the identity' if terms == 1 else 'I + 2S'}, which no number of terms gives here"
            )
        return OFT(
            neumann=4 if terms == 3 else terms, dropout=config["module_dropout"], constrained=config["coft"],
            epsilon=config["eps"], shared=config["block_share"],
        )  # fmt: skip

    def part(self, reading: Reading, spec: OFT, path: str, site: Site) -> Part:
        S = reading.matrix(f"{path}.{self.name(site)}.weight")
        b = (1 + isqrt(1 + 8 * S.shape[1])) // 2
        if b < 2:
            raise CheckpointError(f"{reading.folder}: '{path}' has blocks of {b}, which turn nothing")
        return Part(spec.replace(block_size=b), site, {"S": S if spec.neumann else -S})

    def config(self, methods: Sequence[OFT], sites: Sequence[Site]) -> dict[str, Any]:
        terms, dropout, constrained, epsilon, shared = alike(
            methods, "neumann", "dropout", "constrained", "epsilon", "shared"
        )
        if terms in (2, 3):
            raise cannot(f"PEFT's Neumann series has no form of {terms} terms: I + 2S + 2S² + S³ is its shortest")
        counts = [m.width(s) // m.b for m, s in zip(methods, sites, strict=True)]
        size, number = one_of([method.b for method in methods], counts)
        return {
            "oft_block_size": size, "r": number, "module_dropout": dropout, "coft": constrained, "eps": epsilon,
            "block_share": shared, "use_cayley_neumann": terms > 0, "num_cayley_neumann_terms": terms or 5,
            "init_weights": True, "fan_in_fan_out": False,
        }  # fmt: skip

    def tensors(self, method: OFT, site: Site) -> dict[str, Tensor]:
        return {f"{self.name(site)}.weight": method.S if method.neumann else -method.S}

    def name(self, site: Site) -> str:
        return "oft_embedding_R" if site.is_embedding else "oft_R"


class BoftFamily(ModuleFamily[BOFT]):
    peft_type: ClassVar[str] = "BOFT"
    note: ClassVar[str] = (
        "BOFT on Linear and square Conv2d. Of PEFT's b×b numbers per block the skew-symmetric half is kept, which is "
        "all that counts; more than one factor needs PEFT's CUDA extension there"
    )
    fields: ClassVar[tuple[Field, ...]] = (
        *COMMON, *TARGETS, *LAYERS, STORED_TRANSPOSED,
        idle("boft_block_size", "the tensors tell"), idle("boft_block_num", "the tensors tell"),
        idle("boft_n_butterfly_factor", "the tensors tell: PEFT trains one where its CUDA extension is not built"),
        read("boft_dropout", float, 0.0), read("bias", str, "none", "'all' and 'boft_only' are BitFit beside BOFT"),
        idle("init_weights", "the tensors are in the folder"),
    )  # fmt: skip
    kinds: ClassVar[tuple[type[Method], ...]] = (BOFT,)
    convolutions: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d,)
    places: ClassVar[str] = "nn.Linear and Conv2d"
    checks: ClassVar[tuple[Callable[[Convolution], str], ...]] = (grouped, not_square)

    def spec(self, reading: Reading) -> BOFT:
        return BOFT(dropout=reading.config["boft_dropout"])

    def part(self, reading: Reading, spec: BOFT, path: str, site: Site) -> Part:
        R, s = reading.take(f"{path}.boft_R"), reading.take(f"{path}.boft_s").flatten()
        if R.dim() != 4 or R.shape[2] != R.shape[3] or R.shape[1] * R.shape[2] != site.d_in:
            raise CheckpointError(
                f"{reading.folder}: '{path}.boft_R' is {tuple(R.shape)}, factors of blocks for {site.d_in} inputs are "
                "needed: wrong base?"
            )
        rows, cols = torch.triu_indices(R.shape[2], R.shape[2], 1)
        S = (R.mT - R)[..., rows, cols] / 2  # Cayley's map of PEFT has the other sign
        return Part(spec.replace(block_size=R.shape[2], factors=R.shape[0]), site, {"S": S, "s": s})

    def config(self, methods: Sequence[BOFT], sites: Sequence[Site]) -> dict[str, Any]:
        factors, dropout = alike(methods, "factors", "dropout")
        sizes = [method.size(site) for method, site in zip(methods, sites, strict=True)]
        counts = [site.d_in // b for b, site in zip(sizes, sites, strict=True)]
        size, number = one_of(sizes, counts)
        return {
            "boft_block_size": size, "boft_block_num": number, "boft_n_butterfly_factor": factors,
            "boft_dropout": dropout, "init_weights": True, "fan_in_fan_out": False,
        }  # fmt: skip

    def tensors(self, method: BOFT, site: Site) -> dict[str, Tensor]:
        S = skew(method.S.flatten(0, 1), method.size(site)).unflatten(0, method.S.shape[:2])
        s = method.s if method.s is not None else S.new_ones(site.d_out)
        return {"boft_R": -S, "boft_s": s[None] if isinstance(site.host, ConvHost) else s[:, None]}


def one_of(sizes: Sequence[int], counts: Sequence[int]) -> tuple[int, int]:
    """(size, 0) where all places have blocks of one size, (0, number) where they have one number of them."""
    if len(set(sizes)) == 1:
        return sizes[0], 0
    if len(set(counts)) == 1:
        return 0, counts[0]
    raise cannot(
        f"PEFT has blocks of one size, or one number of them, at all places; here sizes are {sorted(set(sizes))}"
    )


def version(text: str | None) -> tuple[int, ...]:
    """(major, minor) of a version; (0,) where none is known."""
    numbers = [part for part in (text or "0").split(".")[:2] if part.isdigit()]
    return tuple(int(part) for part in numbers) or (0,)
