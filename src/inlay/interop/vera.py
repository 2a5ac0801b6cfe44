"""PEFT's VERA."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from inlay.core.errors import CheckpointError
from inlay.core.files import tensor_bytes
from inlay.core.hosts import LinearHost, TransposedHost
from inlay.core.levels import Level
from inlay.core.method import Method
from inlay.interop.family import Family, Part, Reading, Writing, cannot, one_value
from inlay.interop.fields import COMMON, LAYERS, SAVED, STORED_TRANSPOSED, Field, Names, idle, need, read
from inlay.interop.modules import whole_modules
from inlay.methods.weight.vera import VeRA, projections


class VeraFamily(Family):
    peft_type: ClassVar[str] = "VERA"
    note: ClassVar[str] = "VeRA on Linear and Conv1D, with saved projections or drawn ones (the same generator)"
    fields: ClassVar[tuple[Field, ...]] = (
        *COMMON, *LAYERS, SAVED, STORED_TRANSPOSED,
        need("target_modules", Names), need("r", int), need("projection_prng_key", int),
        read("save_projection", bool, True, "projections that differ from the drawn ones are kept with the adapter"),
        read("vera_dropout", float, 0.0), read("d_initial", float, 0.1),
        read("bias", str, "none", "'all' and 'vera_only' are BitFit beside VeRA"),
        idle("init_weights", "the tensors are in the folder"),
    )  # fmt: skip

    def takes(self, method: Method) -> bool:
        return isinstance(method, VeRA)

    def read(self, reading: Reading) -> list[Part]:
        config = reading.config
        spec = VeRA(
            r=config["r"], seed=config["projection_prng_key"], dropout=config["vera_dropout"],
            d_initial=config["d_initial"],
        )  # fmt: skip
        paths = reading.targets()
        sites = reading.sites(spec, paths)
        if not sites:
            raise CheckpointError(f"{reading.folder}: the configuration names no module")
        tall, wide = (max(site.shape[i] for site in sites.values()) for i in (0, 1))
        spec = self.read_projections(reading, spec, wide, tall)
        reading.adapted += paths
        return [
            Part(spec, site, {
                "d": reading.take(f"{path}.vera_lambda_d"), "b": reading.take(f"{path}.vera_lambda_b"),
            }) for path, site in sites.items()
        ]  # fmt: skip

    def read_projections(self, reading: Reading, spec: VeRA, wide: int, tall: int) -> VeRA:
        """The specification with the projections that the folder holds, or that its key draws."""
        names = ("vera_A", "vera_B")
        if not reading.config["save_projection"] and not any(name in reading.left for name in names):
            return spec
        A, B = (reading.matrix(name) for name in names)
        if A.shape[0] != spec.r or B.shape[1] != spec.r or A.shape[1] < wide or B.shape[0] < tall:
            raise CheckpointError(
                f"{reading.folder}: projections {tuple(A.shape)} and {tuple(B.shape)} do not fit modules of up to "
                f"{tall} × {wide} at rank {spec.r}"
            )
        drawn = projections(spec.seed, spec.r, wide, tall)
        if all(torch.equal(given, own) for given, own in zip((A, B), drawn, strict=True)):
            return spec
        if not reading.config["save_projection"]:
            raise CheckpointError(
                f"{reading.folder}: 'save_projection' is false, yet the folder holds projections, and other ones than "
                f"projection_prng_key {spec.seed} draws: say which are meant by correcting the field"
            )
        digest = hashlib.sha256(tensor_bytes(A) + tensor_bytes(B)).hexdigest()[:32]
        reading.shared |= {f"vera-{digest}-A": A, f"vera-{digest}-B": B}
        return spec.replace(projections=digest)

    def write(self, writing: Writing, levels: Sequence[Level]) -> None:
        methods = [level.method for level in levels if isinstance(level.method, VeRA)]
        for site in whole_modules(levels, "VeRA"):
            if type(site.host) not in (LinearHost, TransposedHost):
                raise cannot(f"PEFT has VeRA on linear layers alone, '{site.path}' is {type(site.module).__name__}")
        one_value((method.drawn for method in methods), "pair of projections")
        paths = [level.site.path for level in levels]
        A, B = self.shared(methods[0])
        if A.shape[1] < max(level.site.d_in for level in levels) or A.shape[0] != methods[0].r:
            raise cannot("the projections are those of other modules")
        writing.config |= {
            "r": methods[0].r,
            "projection_prng_key": methods[0].seed,
            "save_projection": True,  # the folder then reads the same with any version of torch
            "vera_dropout": one_value((method.dropout for method in methods), "dropout"),
            "d_initial": methods[0].d_initial,
            "init_weights": True,
            "fan_in_fan_out": any(type(level.site.host) is TransposedHost for level in levels),
            "target_modules": writing.targets(paths),
        }
        writing.tensors |= {"vera_A": A, "vera_B": B}
        for path, method in zip(paths, methods, strict=True):
            writing.tensors |= {f"{path}.vera_lambda_d": method.d, f"{path}.vera_lambda_b": method.b}
        writing.adapted += paths

    def shared(self, method: VeRA) -> tuple[Tensor, Tensor]:
        """The projections in full, as all sites share them."""
        return method.site.shared_now(f"{method.drawn}-A"), method.site.shared_now(f"{method.drawn}-B")
