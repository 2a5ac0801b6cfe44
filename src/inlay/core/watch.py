"""Watching a network while batches go through it: what its modules are given, and the gradients of its tensors.

Inputs are seen by hooks, gradients are taken from each tensor the moment the backward pass has them, so no activation
outlives its batch and no two gradients of base tensors exist at once. Modules that are given the very same tensor
(query, key and value) share one statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.calls import first, first_output
from inlay.core.container import Inlay
from inlay.core.errors import CalibrationError
from inlay.core.hosts import ConvHost, QuantisedHost
from inlay.core.method import Method
from inlay.core.sites import Site
from inlay.core.statistics import Calibrated, Gradient, InputStatistic, OutputStatistic, Statistic

Loss = Callable[[Any, Any], Tensor]


class Watch:
    """Feeds every method's statistic while batches go through the network."""

    def __init__(self, inlay: Inlay, methods: list[Calibrated], stack: ExitStack) -> None:
        self.inlay, self.methods = inlay, methods
        self.statistics: dict[tuple[str, tuple], InputStatistic] = {}
        """By module path and kind; the same one at modules that are given the same tensor."""
        self.gradients: dict[tuple[str, str], Gradient] = {}
        """By module path and tensor name."""
        self.recent: Tensor | None = None
        """The tensor that the last module was given, and which statistics have seen it."""
        self.fed: dict[tuple, InputStatistic] = {}
        for site, kinds in self.inputs().values():
            read = self.reader(site, kinds)
            stack.callback(site.module.register_forward_pre_hook(read, with_kwargs=True).remove)
        self.outputs: dict[Method, OutputStatistic] = {}
        """Of each method that asks for its place's outputs."""
        self.classes: Tensor | None = None
        """The class of each row of the batch, where it has labels that say so."""
        for method in methods:
            statistic = None if method.wants_gradient else method.statistic()
            if isinstance(statistic, OutputStatistic):
                self.outputs[method] = statistic
                hook = self.listener(method.site, statistic)
                stack.callback(method.site.module.register_forward_hook(hook).remove)
        for method in methods:
            site = method.site
            if method.wants_gradient and (site.path, site.param) not in self.gradients:
                self.gradients[site.path, site.param] = gradient = Gradient()
                if isinstance(site.host, QuantisedHost):
                    stack.callback(site.module.register_forward_hook(product_of(gradient), with_kwargs=True).remove)
                else:
                    stack.enter_context(taken(site.parameter, gradient))

    def inputs(self) -> dict[str, tuple[Site, dict[tuple, Callable[[], Statistic]]]]:
        """Which statistics of its input each module is asked for: by path, by kind, how to make one."""
        asked: dict[str, tuple[Site, dict[tuple, Callable[[], Statistic]]]] = {}
        for method in self.methods:
            if not method.wants_gradient and not isinstance(method.statistic(), OutputStatistic):
                asked.setdefault(method.site.path, (method.site, {}))[1][kind_of(method)] = method.statistic
        return asked

    def reader(self, site: Site, kinds: dict[tuple, Callable[[], Any]]) -> Callable[..., None]:
        """The hook of a module that is asked for statistics of these kinds."""

        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = first(args, kwargs)
            fed = self.seen_by(site, x)
            vectors = None
            for kind, make in kinds.items():
                if kind in fed:  # the module before has been given the same tensor
                    self.statistics.setdefault((site.path, kind), fed[kind])
                    continue
                statistic = self.statistics.setdefault((site.path, kind), make())
                if vectors is None:
                    vectors = finite(self.real(site, x.detach()), "inputs", site)
                if len(vectors):
                    with plain_arithmetic(x.device):
                        statistic.add(vectors)
                fed[kind] = statistic

        return read

    def listener(self, site: Site, statistic: OutputStatistic) -> Callable[..., None]:
        """The hook of a module whose outputs are asked for."""

        def listen(module: nn.Module, args: tuple, output: Any) -> None:
            y = first_output(output).detach().float()
            y = y if site.rows is None else site.rows.take(y, -1)
            y = y.movedim(-1 - site.host.axes, -1) if isinstance(site.host, ConvHost) else y
            known = self.classes is not None and len(self.classes) == len(y)
            classes = self.classes if known and self.classes is not None else torch.zeros(len(y), dtype=torch.int64)
            classes = classes.to(y.device).reshape(-1, *(1 for _ in y.shape[2:])).expand(y.shape[:-1])
            vectors, kept = finite(y.flatten(0, -2), "outputs", site), self.kept(site, y.shape[:-1].numel())
            if kept is not None:
                vectors, classes = vectors[kept], classes.flatten()[kept]
            if len(vectors):
                statistic.add(vectors, classes.flatten())

        return listen

    def seen_by(self, site: Site, x: Tensor) -> dict[tuple, InputStatistic]:
        """The statistics, by kind, that have seen this very input; of a convolution each sees patches of its own."""
        if isinstance(site.host, ConvHost):
            return {}
        if x is not self.recent:
            self.recent, self.fed = x, {}
        return self.fed

    def real(self, site: Site, x: Tensor) -> Tensor:
        """The vectors of a module's input without those of padded tokens."""
        assert site.host is not None
        vectors = site.host.vectors(site.module, x).float()
        kept = self.kept(site, len(vectors))
        return vectors if kept is None else vectors[kept.to(vectors.device)]

    def kept(self, site: Site, n: int) -> Tensor | None:
        """Which of n vectors are of real tokens; None for all."""
        mask = self.inlay.call.mask
        if mask is None or mask.numel() != n or site.name.startswith("decoder."):
            return None  # no tokens here (a map, one vector per row), or not those that the mask speaks of
        return mask.flatten()

    def see(self, model: nn.Module, batch: Any, loss: Loss | None) -> None:
        """One batch forwards, and backwards where gradients are wanted."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        whole = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
        self.classes = labels if whole else None
        with torch.set_grad_enabled(bool(self.gradients)):
            if isinstance(batch, Mapping):
                output = model(**batch)
            elif isinstance(batch, Tensor):
                output = model(batch)
            else:
                output = model(*batch)
            self.recent, self.fed = None, {}
            if self.gradients:
                value_of(output, batch, loss).backward()

    @property
    def settled(self) -> bool:
        """Whether no statistic needs more batches."""
        return (
            not self.gradients and not self.outputs and all(statistic.settled for statistic in self.statistics.values())
        )

    def found(self) -> dict[Method, Statistic]:
        """Every method's statistic; CalibrationError where one has seen nothing, or something that is not finite."""
        found: dict[Method, Statistic] = {}
        for method in self.methods:
            site = method.site
            statistic: Statistic | None = self.outputs.get(method)
            if method.wants_gradient:
                statistic = self.gradients[site.path, site.param]
            elif statistic is None:
                statistic = self.statistics.get((site.path, kind_of(method)))
            if statistic is None or not statistic.samples:
                raise CalibrationError(f"the batches never came through '{site.path}', where {method.label()} is")
            if isinstance(statistic, Gradient) and statistic.total is not None:
                finite(statistic.total, "gradients", site)
            found[method] = statistic
        return found


def finite(t: Tensor, what: str, site: Site) -> Tensor:
    """t, or CalibrationError where a number of it is infinite or none."""
    if not t.isfinite().all():
        raise CalibrationError(f"the {what} at '{site.path}' are not all finite: look at the batches")
    return t


def kind_of(method: Calibrated) -> tuple:
    """What tells one statistic of an input from another."""
    statistic = method.statistic()
    assert isinstance(statistic, InputStatistic)
    return statistic.kind


def value_of(output: Any, batch: Any, loss: Loss | None) -> Tensor:
    """The loss of a batch; CalibrationError where there is none."""
    value = output.get("loss") if loss is None and isinstance(output, Mapping) else None
    if loss is not None:
        value = loss(output, batch)
    if value is None:
        raise CalibrationError(
            "gradients are wanted, but the model's output has no loss: give batches with labels, or calibrate(…, "
            "loss=lambda output, batch: …)"
        )
    return value


@contextmanager
def taken(p: Tensor, gradient: Gradient) -> Iterator[None]:
    """Gradients of a frozen tensor go to a statistic as soon as they are there, and are not kept."""

    def take(p: Tensor) -> None:
        assert p.grad is not None
        gradient.add(p.grad)
        p.grad = None

    before = p.requires_grad
    p.requires_grad_(True)
    handle = p.register_post_accumulate_grad_hook(take)
    try:
        yield
    finally:
        handle.remove()
        p.requires_grad_(before)


def product_of(gradient: Gradient) -> Callable[..., Tensor]:
    """The hook of a layer whose own tensor cannot have a gradient, being quantised: that of W is (∂loss/∂y)ᵀ x."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor:
        x = first(args, kwargs).detach()
        leaf = not y.requires_grad
        y.requires_grad_().register_hook(lambda g: gradient.add(g.flatten(0, -2).float().T @ x.flatten(0, -2).float()))
        return y.clone() if leaf else y  # which the model may go on to change in place

    return hook


def plain_arithmetic(device: torch.device) -> torch.autocast:
    """No autocast: statistics are in float32 whatever the network computes in."""
    return torch.autocast(device.type, enabled=False)
