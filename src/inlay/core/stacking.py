"""What can act on top of what at one place, and why the rest is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from inlay.core.container import Inlay
from inlay.core.errors import ComposeError
from inlay.core.levels import Level, acts_on_output
from inlay.core.method import Method, ParameterMethod, WeightMethod
from inlay.core.sites import Site

if TYPE_CHECKING:
    pass


def compose(inlay: Inlay, name: str, site: Site, method: Method) -> None:
    """Refuse a method that cannot act on top of what the same adapter already has at this site."""
    mount = inlay.state.mounts.get(site.path)
    stand(mount.levels.get(name, []) if mount else [], site, method)


def stand(levels: Sequence[Level], site: Site, method: Method) -> None:
    """ComposeError where a method cannot stand on these levels of its module."""
    below = [lv for lv in levels if overlapping(lv.site, site)]
    if isinstance(method, ParameterMethod):
        readers = [lv for lv in below if isinstance(lv.method, WeightMethod) and lv.method.reads_weight]
        reader = [lv for lv in readers if tensor_of(lv.site) == tensor_of(site)]
        if reader:
            raise ComposeError(
                f"{method.label()} replaces the tensor that {reader[0].method.label()} reads at '{site.path}'"
            )
        if any(isinstance(lv.method, ParameterMethod) and lv.site.param == site.param for lv in below):
            raise ComposeError(f"two methods train their own copy of '{site.key}': keep one of them")
    if not isinstance(method, WeightMethod):
        return
    if method.reads_weight and below:
        raise ComposeError(
            f"{method.label()} reads W at '{site.path}', so it must come first there, "
            f"but {below[0].method.label()} already acts on it: list {method.label()} first, or compose it as `of=`"
        )
    outer = [lv for lv in below if acts_on_output(lv)] if method.formed() else []
    if outer:
        raise ComposeError(
            f"{method.label()} changes the tensor that '{site.path}' reads and {outer[0].method.label()} acts on its "
            f"output, so {method.label()} must come first there: list it first"
        )


def check_stack(inlay: Inlay, names: Sequence[str]) -> None:
    """ComposeError where adapters cannot act on top of each other, in this order; of several heads the last counts."""
    for mount in inlay.state.mounts.values() if len(names) > 1 else ():
        levels: list[Level] = []
        for name in names:
            own = [level for level in mount.levels.get(name, ()) if not level.head]
            for level in own if levels else ():
                stand(levels, level.site, level.method)
            levels += own
    for tokens in inlay.state.tokens.values():
        tokens.stack(names)


def overlapping(a: Site, b: Site) -> bool:
    """Whether two sites of one module touch the same numbers: one tensor, or a tensor and its bias."""
    if tensor_of(a) != tensor_of(b) and a.param != b.bias_name and b.param != a.bias_name:
        return False
    if a.rows is not None and b.rows is not None and a.param == b.param:
        return a.rows == b.rows
    if a.expert is not None and b.expert is not None and a.param == b.param:
        return a.expert == b.expert
    return True


def tensor_of(site: Site) -> str:
    """Which tensor of its module a site is about; whatever a quantised layer is made of is its weight."""
    return "weight" if site.packed else site.param
