"""PEFT's ROAD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from inlay.core.method import Method
from inlay.core.sites import Site
from inlay.interop.family import Part, Reading, cannot
from inlay.interop.fields import COMMON, SAVED, Field, Names, idle, need, read
from inlay.interop.modules import ModuleFamily, alike
from inlay.methods.weight.road import RoAd


class RoadFamily(ModuleFamily[RoAd]):
    peft_type: ClassVar[str] = "ROAD"
    note: ClassVar[str] = "RoAd on Linear whose outputs are whole groups"
    fields: ClassVar[tuple[Field, ...]] = (
        *COMMON, SAVED, need("target_modules", Names),
        read("variant", str, "road_1"), read("group_size", int, 64, "group"),
        idle("init_weights", "the tensors are in the folder"),
    )  # fmt: skip
    kinds: ClassVar[tuple[type[Method], ...]] = (RoAd,)

    def spec(self, reading: Reading) -> RoAd:
        name = reading.config["variant"].removeprefix("road_")
        return RoAd(group=reading.config["group_size"]).replace(variant=int(name) if name.isdigit() else name)

    def part(self, reading: Reading, spec: RoAd, path: str, site: Site) -> Part:
        both = {name: reading.take(f"{path}.road_{name}") for name in ("theta", "alpha")}
        whole = all(t.numel() % (2 * spec.group) == 0 for t in both.values())
        if spec.variant == 4 and whole:  # two sets for each group, one group after the other
            both = {name: t.view(-1, 2, spec.group).transpose(0, 1).flatten(1) for name, t in both.items()}
        return Part(spec, site, both)

    def config(self, methods: Sequence[RoAd], sites: Sequence[Site]) -> dict[str, Any]:
        variant, group = alike(methods, "variant", "group")
        for site in sites:
            if site.d_out % group:
                raise cannot(
                    f"'{site.path}' has {site.d_out} outputs, which are no whole groups of {group}: PEFT has no RoAd "
                    "that leaves some out"
                )
        return {"variant": f"road_{variant}", "group_size": group, "init_weights": True}

    def tensors(self, method: RoAd, site: Site) -> dict[str, Tensor]:
        both: dict[str, Tensor] = {"theta": method.theta, "alpha": method.alpha}
        if method.variant == 4:
            both = {name: t.view(2, -1, method.group).transpose(0, 1).flatten() for name, t in both.items()}
        return {f"road_{name}": t for name, t in both.items()}
