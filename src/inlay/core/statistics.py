"""What methods may want to know about data before training: statistics that grow with places, not with batches.

A statistic is added to batch by batch and holds no activation of any of them. `inlay.core.calibrate` feeds them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from inlay.core.errors import CalibrationError, SiteError
from inlay.core.hollow import hollow
from inlay.core.method import Method
from inlay.core.sites import Site
from inlay.core.spectrum import OVERSAMPLING, svd


class Statistic:
    """Something about one place in the network, over all batches so far."""

    samples: int = 0
    """Vectors it has seen (of inputs or outputs; batches for gradients)."""
    settled: bool = False
    """Whether more batches would hardly change it."""


class InputStatistic(Statistic, ABC):
    """About the vectors x (d_in,) that a matrix acts on; padded tokens are left out."""

    @property
    @abstractmethod
    def kind(self) -> tuple[Any, ...]:
        """Equal for statistics that are the same wherever their inputs are: those are computed once."""

    @abstractmethod
    def add(self, X: Tensor) -> None:
        """More vectors, (n, d_in) with n ≥ 1, in float32."""


class Moment(InputStatistic):
    """The second moment C = (1/n) Σ x xᵀ, (d_in, d_in)."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        return ("moment",)

    def add(self, X: Tensor) -> None:
        product = X.T @ X
        self.total = product if self.total is None else self.total.add_(product)
        self.samples += len(X)

    @property
    def mean(self) -> Tensor:
        """C."""
        assert self.total is not None
        return self.total / self.samples


class Components(InputStatistic):
    """The leading principal components of the inputs, by an incremental SVD (Ross et al. 2008).

    Args:
        k: how many are wanted; some more are followed, so that what is cut off batch by batch does not turn them.
        centred: whether the mean is taken off, as in a principal component analysis, or x itself is decomposed.
        tau: settled when a batch turns none of the leading `watched` ones by more than this cosine; 1: never.
    """

    def __init__(self, k: int, watched: int, centred: bool = True, tau: float = 1.0) -> None:
        self.k, self.watched, self.centred, self.tau = k, watched, centred, tau
        self.mean: Tensor | None = None
        self.vectors: Tensor | None = None
        """Orthonormal rows (k + some, d_in), strongest first."""
        self.values: Tensor | None = None
        """Their singular values."""
        self.spread: float = 0.0
        """Σ‖x − mean‖² over all directions."""

    @property
    def kind(self) -> tuple[Any, ...]:
        return ("components", self.k, self.watched, self.centred, self.tau)

    def add(self, X: Tensor) -> None:
        if self.settled:
            return
        n, mean = len(X), X.mean(0) if self.centred else X.new_zeros(X.shape[1])
        rows, before = X - mean, self.vectors
        self.spread += float(rows.square().sum())
        if self.mean is None or self.values is None or before is None:
            self.mean = mean
        else:
            both = self.samples * n / (self.samples + n)
            shift = mean - self.mean  # what the two means differ by is spread as well
            self.spread += both * float(shift.square().sum())
            rows = torch.cat([self.values[:, None] * before, rows, both**0.5 * shift[None]])
            self.mean = self.mean + shift * (n / (self.samples + n))
        _, self.values, V = svd(rows, self.k + OVERSAMPLING)
        self.vectors = V.T
        self.samples += n
        if before is not None and self.tau < 1 and len(before) >= self.watched:
            turned = (before[: self.watched] * self.vectors[: self.watched]).sum(1).abs()
            self.settled = bool((turned >= self.tau).all())

    @property
    def components(self) -> Tensor:
        """Orthonormal rows (at most k, d_in), strongest first, the largest number of each positive."""
        assert self.vectors is not None
        V = self.vectors[: self.k]
        return V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign()

    @property
    def ratios(self) -> Tensor:
        """The share of the inputs' variance that each of them explains."""
        assert self.values is not None
        return self.values[: self.k].square().double() / max(self.spread, 1e-300)


class OutputStatistic(Statistic, ABC):
    """About the vectors y (d_out,) that a place gives out; padded tokens are left out."""

    @abstractmethod
    def add(self, Y: Tensor, classes: Tensor) -> None:
        """More vectors, (n, d_out) with n ≥ 1, in float32, and the class of each (n,), 0 where there are none."""


class ChannelNorms(OutputStatistic):
    """How large each channel is: for each class √(Σ y²) over all vectors of it, averaged over the classes."""

    def __init__(self) -> None:
        self.squares: dict[int, Tensor] = {}

    def add(self, Y: Tensor, classes: Tensor) -> None:
        for c in classes.unique().tolist():
            total = Y[classes == c].square().sum(0)
            self.squares[c] = total if c not in self.squares else self.squares[c].add_(total)
        self.samples += len(Y)

    @property
    def norms(self) -> Tensor:
        """(d_out,)."""
        return torch.stack([total.sqrt() for _, total in sorted(self.squares.items())]).mean(0)


class Gradient(Statistic):
    """Σ over batches of ∂loss/∂p for a tensor p of the base, in the shape it is stored in, on the CPU."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """That of one more batch."""
        part = gradient.detach().to("cpu", torch.float32)
        self.total = part.clone() if self.total is None else self.total.add_(part)
        self.samples += 1


# ---------------------------------------------------------------------- methods that want one
class Calibrated(Method):
    """A method whose tensors start from data. Attached it has an honest start without; `inlay.calibrate` brings them.

    Every built copy says which statistic it wants of its site, and turns it into tensors when the batches are through.
    What they give is saved with the adapter, so that loading needs no data.
    """

    wants_gradient: ClassVar[bool] = False
    """Whether its statistic is a `Gradient`; otherwise it is one of inputs or outputs, which must be in sight."""

    def build(self, site: Site) -> None:
        host = site.host
        if not self.wants_gradient and site.is_embedding:
            raise SiteError(f"{self.label()} starts from the vectors a matrix acts on, but '{site.path}' reads ids")
        if not self.wants_gradient and (host is None or not host.hooked):
            raise SiteError(
                f"{self.label()} starts from the inputs of a matrix, but those of '{site.key}' are out of sight: "
                "other code than the module's own forward applies it"
            )
        self.register_buffer("samples", torch.tensor(0))
        self.plant(site)

    @abstractmethod
    def plant(self, site: Site) -> None:
        """Create this site's tensors as they are without data."""

    @abstractmethod
    def statistic(self) -> Statistic:
        """What is wanted of this site, with nothing added yet."""

    @abstractmethod
    def calibrated(self, found: Mapping[Method, Any]) -> dict[str, Tensor]:
        """Its tensors by name as the statistics of all methods say; their shapes may differ from those until now.

        CalibrationError where the statistics are too poor; nothing is changed then.
        """

    @property
    def is_calibrated(self) -> bool:
        """Whether it has seen data; `samples` says how many."""
        samples = self.get_buffer("samples")
        return not hollow(samples) and bool(samples)

    def enough(self, found: Statistic, rank: int) -> None:
        """CalibrationError where fewer vectors were seen than a rank needs."""
        if found.samples <= rank:
            raise CalibrationError(
                f"{self.label()} needs more than {rank} input vectors at '{self.site.path}', the batches held "
                f"{found.samples}: give more batches, or a lower rank"
            )


def starts_from_data(method: Method) -> bool:
    """Whether a method, or one that it is made of, is to be calibrated."""
    return any(isinstance(m, Calibrated) for m in method.modules())
