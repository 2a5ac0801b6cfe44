"""PEFT's LOHA and LOKR."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from inlay.core.errors import CheckpointError
from inlay.core.method import Method
from inlay.core.sites import Site
from inlay.interop.family import Part, Reading, cannot
from inlay.interop.fields import COMMON, LAYERS, TARGETS, Field, idle, need, read
from inlay.interop.matching import common, tidy, value_at
from inlay.interop.modules import Convolution, ModuleFamily, alike, no_dropout, pads_otherwise
from inlay.methods.weight.krona import KronA
from inlay.methods.weight.kronecker import divisors, split
from inlay.methods.weight.loha import LoHa
from inlay.methods.weight.lokr import LoKr
from inlay.methods.weight.ranked import Cored, Shapes

FIELDS = (
    *COMMON, *TARGETS, *LAYERS,
    need("r", int), need("alpha", float),
    read("rank_pattern", dict[str, int] | None), read("alpha_pattern", dict[str, float] | None),
    read("use_effective_conv2d", bool, False, "tucker"),
    read("rank_dropout", float, 0.0, "row_dropout"), read("module_dropout", float, 0.0),
)  # fmt: skip
C = TypeVar("C", bound=Cored)


class LycorisFamily(ModuleFamily[C]):
    """Either: tensors by the names in `names`, ranks and scales by pattern."""

    convolutions: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d)
    places: ClassVar[str] = "nn.Linear, Conv1d and Conv2d"
    checks: ClassVar[tuple[Callable[[Convolution], str], ...]] = (pads_otherwise,)
    names: ClassVar[Mapping[str, str]]

    def at(self, reading: Reading, spec: C, path: str) -> C:
        """The rank and the scale of one module."""
        config = reading.config
        return spec.replace(
            r=value_at(config["rank_pattern"], path, spec.r), alpha=value_at(config["alpha_pattern"], path, spec.alpha)
        )

    def take(self, reading: Reading, path: str, shapes: Shapes) -> dict[str, Tensor]:
        """The factors of one module as inlay has them."""
        found = {}
        for name in shapes:
            t = reading.matrix(f"{path}.{self.names[name]}")
            if name.startswith("T"):
                t = t.unflatten(1, (t.shape[0], -1)) if t.shape[1] % t.shape[0] == 0 else t
            found[name] = t.T if transposed(name, shapes) else t
        return found

    def layout(self, shapes: Shapes, factors: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
        """The factors of one module as PEFT has them: kernels unfolded, as two-dimensional ones in a core."""
        kernel, found = site.parameter.shape[2:], {}
        for name in shapes:
            t = factors[name]
            if name.startswith("T"):
                t = t.reshape(*t.shape[:2], *kernel, *(1 for _ in range(2 - len(kernel))))
            elif name == "D":
                t = t.reshape(t.shape[0], -1, *kernel)
            found[self.names[name]] = t.T if transposed(name, shapes) else t
        return found

    def described(self, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
        """The fields of rank and scale."""
        config: dict[str, Any] = {"init_weights": True}
        config["r"], config["rank_pattern"] = common(ranks)
        config["alpha"], config["alpha_pattern"] = common({path: tidy(a) for path, a in alphas.items()})
        return config


class LohaFamily(LycorisFamily[LoHa]):
    peft_type: ClassVar[str] = "LOHA"
    note: ClassVar[str] = "LoHa on Linear, Conv1d and Conv2d"
    fields: ClassVar[tuple[Field, ...]] = (*FIELDS, idle("init_weights", "the tensors are in the folder"))
    kinds: ClassVar[tuple[type[Method], ...]] = (LoHa,)
    names: ClassVar[Mapping[str, str]] = {
        "B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b", "T1": "hada_t1", "T2": "hada_t2",
    }  # fmt: skip

    def spec(self, reading: Reading) -> LoHa:
        config = reading.config
        return LoHa(
            r=config["r"], alpha=config["alpha"], tucker=config["use_effective_conv2d"],
            row_dropout=config["rank_dropout"], module_dropout=config["module_dropout"],
        )  # fmt: skip

    def part(self, reading: Reading, spec: LoHa, path: str, site: Site) -> Part:
        here = self.at(reading, spec, path)
        return Part(here, site, self.take(reading, path, here.shapes(site)))

    def config(self, methods: Sequence[LoHa], sites: Sequence[Site]) -> dict[str, Any]:
        no_dropout(methods, self.peft_type)
        tucker, rescale, rests = *alike(methods, "tucker", "rescale"), resting(methods)
        if rests["rank_dropout"] and not rescale:
            raise cannot("PEFT's LOHA scales the rows that stay up by as many as rest: `rescale` must be on")
        ranks = {site.path: method.r for method, site in zip(methods, sites, strict=True)}
        alphas = {site.path: alpha_of(method) for method, site in zip(methods, sites, strict=True)}
        return self.described(ranks, alphas) | rests | {"use_effective_conv2d": tucker}

    def tensors(self, method: LoHa, site: Site) -> dict[str, Tensor]:
        return self.layout(method.shapes(site), dict(method.named_parameters()), site)


class LokrFamily(LycorisFamily[LoKr]):
    peft_type: ClassVar[str] = "LOKR"
    note: ClassVar[str] = (
        "LoKr on Linear, Conv1d and Conv2d; KronA with rows = columns, which is one with full factors. Where "
        "`decompose_factor` is beyond the root of a width PEFT puts the large factor first: that is read as KronA"
    )
    fields: ClassVar[tuple[Field, ...]] = (
        *FIELDS,
        read("decompose_both", bool, False), read("decompose_factor", int, -1, "factor"),
        read("rank_dropout_scale", bool, False, "rescale"),
        read("init_weights", bool | str, True, "'lycoris' is init='lycoris'; the tensors are in the folder"),
    )  # fmt: skip
    kinds: ClassVar[tuple[type[Method], ...]] = (LoKr, KronA)
    names: ClassVar[Mapping[str, str]] = {
        "C": "lokr_w1", "C1": "lokr_w1_a", "C2": "lokr_w1_b",
        "D": "lokr_w2", "B": "lokr_w2_a", "A": "lokr_w2_b", "T": "lokr_t2",
    }  # fmt: skip

    def spec(self, reading: Reading) -> LoKr:
        config = reading.config
        return LoKr(
            r=config["r"], alpha=config["alpha"], factor=config["decompose_factor"],
            decompose_both=config["decompose_both"], tucker=config["use_effective_conv2d"],
            init="lycoris" if config["init_weights"] == "lycoris" else "peft",
            row_dropout=config["rank_dropout"], module_dropout=config["module_dropout"],
            rescale=config["rank_dropout_scale"] or not config["rank_dropout"],
        )  # fmt: skip

    def part(self, reading: Reading, spec: LoKr, path: str, site: Site) -> Part:
        here, (out, inn) = self.at(reading, spec, path), parts_of(site, spec.factor)
        if (out, inn) == tuple(divisors(d, spec.factor) for d in widths(site)):
            shapes = here.shapes(site)
            if "D" in shapes and (reason := scrambles(site)):
                raise CheckpointError(f"{reading.folder}: '{path}' cannot be read: {reason}")
            return Part(here, site, self.take(reading, path, shapes))
        if f"{path}.lokr_w1" not in reading.left or f"{path}.lokr_w2" not in reading.left:
            raise CheckpointError(
                f"{reading.folder}: '{path}' cannot be read: 'decompose_factor' = {spec.factor} is beyond the root of "
                f"its width, so that PEFT gives the large factor no rank, inlay the small one"
            )
        C, D = reading.matrix(f"{path}.lokr_w1"), reading.matrix(f"{path}.lokr_w2")
        return Part(KronA(rows=out[0], columns=inn[0], scale=here.scale), site, {"A": C, "B": D})

    def config(self, methods: Sequence[LoKr], sites: Sequence[Site]) -> dict[str, Any]:
        no_dropout(methods, self.peft_type)
        ranks, alphas = dict[str, int](), dict[str, float]()
        for method, site in zip(methods, sites, strict=True):
            if isinstance(method, KronA):  # the smallest rank for which PEFT leaves both factors full
                large = (site.d_out // method.A.shape[0], site.d_in // site.kernel_area // method.A.shape[1])
                ranks[site.path] = -(-max(*large, *method.A.shape) // 2)
                alphas[site.path] = method.scale * ranks[site.path]
            else:
                ranks[site.path], alphas[site.path] = method.r, alpha_of(method)
        own = [method for method in methods if isinstance(method, LoKr)]
        both, tucker, init, rescale = (
            alike(own, "decompose_both", "tucker", "init", "rescale") if own else (False, False, "peft", False)
        )
        rests = resting(own or [LoKr()])
        return self.described(ranks, alphas) | rests | {
            "rank_dropout_scale": bool(rests["rank_dropout"]) and rescale,
            "decompose_both": both, "use_effective_conv2d": tucker, "init_weights": init if init == "lycoris" else True,
            "decompose_factor": factor_for([split_of(m, s) for m, s in zip(methods, sites, strict=True)], sites),
        }  # fmt: skip

    def tensors(self, method: LoKr, site: Site) -> dict[str, Tensor]:
        shapes: Shapes = {"C": (), "D": ()} if isinstance(method, KronA) else method.shapes(site)
        factors = {"C": method.A, "D": method.B} if isinstance(method, KronA) else dict(method.named_parameters())
        if "D" in shapes and (reason := scrambles(site)):
            raise cannot(f"'{site.path}': {reason}")
        return self.layout(shapes, factors, site)


def resting(methods: Sequence[Cored]) -> dict[str, float]:
    """The fields of what rests in training."""
    rows, modules = alike(methods, "row_dropout", "module_dropout")
    return {"rank_dropout": rows, "module_dropout": modules}


def transposed(name: str, shapes: Shapes) -> bool:
    """Whether PEFT stores a factor the other way round: that of the outputs beside a core."""
    return name.startswith("B") and any(other.startswith("T") for other in shapes)


def alpha_of(method: Cored) -> float:
    """α, with which PEFT's α/r is the scale."""
    return method.alpha if not method.rank_stabilized else method.scale * method.r


def widths(site: Site) -> tuple[int, int]:
    """The widths that a Kronecker product divides: outputs, and the inputs of a kernel's tap."""
    return site.d_out, site.d_in // site.kernel_area


def parts_of(site: Site, factor: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """How PEFT divides them: a factor that fits comes first, even if it is the larger part."""
    first, second = (
        (factor, d // factor) if factor > 0 and d % factor == 0 else divisors(d, factor) for d in widths(site)
    )
    return first, second


def split_of(method: LoKr | KronA, site: Site) -> tuple[int, int]:
    """(m_out, m_in), the shape of the small factor."""
    if isinstance(method, KronA):
        return split(method, site.d_out, site.d_in, method.rows, method.columns)
    out, inn = (divisors(d, method.factor)[0] for d in widths(site))
    return out, inn


def factor_for(wanted: Sequence[tuple[int, int]], sites: Sequence[Site]) -> int:
    """The one `decompose_factor` that divides the widths of all modules as wanted."""
    for factor in (-1, *sorted({m for pair in wanted for m in pair})):
        if all(tuple(m for m, _ in parts_of(site, factor)) == pair for site, pair in zip(sites, wanted, strict=True)):
            return factor
    shown = ", ".join(f"{a} × {b}" for a, b in sorted(set(wanted))[:3])
    raise cannot(f"PEFT's LoKr divides all widths by one decompose_factor, which cannot give first factors of {shown}")


def scrambles(site: Site) -> str:
    """Why PEFT's product of full factors is none: on Conv1d it multiplies a matrix with a three-dimensional kernel."""
    if not isinstance(site.module, nn.Conv1d):
        return ""
    return "PEFT 0.21.2 multiplies the factors of a Conv1d along the wrong axes where the second is full"
