"""Attributes of one module that are read through properties while something is attached.

The module gets a private subclass of its own class that differs in those properties only: same name, same forward,
same `isinstance` answers, and its own class again afterwards. Two kinds of attribute need it: tensors that a mount
adapts (`weight`, `bias`, `running_mean`, …), and BatchNorm's `training`, so that statistics of the base hold still.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

if TYPE_CHECKING:
    from inlay.core.mount import Mount

MOUNT, NAMES, HELD = "_inlay_mount", "_inlay_names", "_inlay_held"


def adapt_tensors(module: nn.Module, mount: Mount, names: frozenset[str]) -> None:
    """Let the tensors `names` of this one module be read through its mount."""
    module.__dict__[MOUNT], module.__dict__[NAMES] = mount, names
    _wear(module)


def release_tensors(module: nn.Module) -> None:
    """Undo `adapt_tensors`."""
    if module.__dict__.pop(MOUNT, None) is not None:
        del module.__dict__[NAMES]
        _wear(module)


def hold_statistics(model: nn.Module) -> None:
    """Let every BatchNorm of the base normalise with its running statistics and leave them alone, in training too.

    They belong to the base, which is frozen: `training` reads False on these modules, whatever `train()` says, until
    `release_statistics`; only an adapter that keeps statistics of its own lets it read what its own mode is. Layers
    without running statistics have none to keep and stay as they are.
    """
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            module.__dict__[HELD] = True
            _wear(module)


def release_statistics(model: nn.Module) -> None:
    """Undo `hold_statistics`; what `train()` or `eval()` said meanwhile holds from now on."""
    for module in model.modules():
        if module.__dict__.pop(HELD, None) is not None:
            _wear(module)


# ---------------------------------------------------------------------- the private subclass
def _wear(module: nn.Module) -> None:
    """The class that the module's entries ask for; its own where they ask for nothing."""
    cls = type(module)
    own = cls.__bases__[0] if "_inlay_worn" in cls.__dict__ else cls
    names: frozenset[str] = module.__dict__.get(NAMES, frozenset())
    held = HELD in module.__dict__
    module.__class__ = _worn(own, names, held) if names or held else own


@cache
def _worn(cls: Any, names: frozenset[str], held: bool) -> type[nn.Module]:
    body: dict[str, Any] = {name: _tensor(name) for name in sorted(names)} | ({"training": _training} if held else {})
    if issubclass(cls, nn.RNNBase) and names:
        body["_flat_weights"] = _flat_weights
    body |= {"_inlay_worn": True, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body)


def _tensor(name: str) -> property:
    def read(module: nn.Module) -> Any:
        mount = module.__dict__.get(MOUNT)
        if mount is None:  # another library subclassed the module on top of ours and kept this class
            return module._parameters[name] if name in module._parameters else module._buffers[name]
        try:
            return mount.read(name)
        except AttributeError as error:  # nn.Module.__getattr__ would hide it and give the plain base tensor
            raise RuntimeError(f"inlay could not adapt '{name}': {error}") from error

    return property(read)


def _read_training(module: nn.Module) -> bool:
    if HELD not in module.__dict__:
        return module.__dict__["training"]
    mount = module.__dict__.get(MOUNT)
    return mount is not None and mount.updates_states()


def _write_training(module: nn.Module, value: bool) -> None:
    module.__dict__["training"] = value


_training = property(_read_training, _write_training)


def _read_flat(module: nn.RNNBase) -> list[Any]:
    if module.__dict__.get(MOUNT) is None:
        return module.__dict__["_flat_weights"]
    return [getattr(module, name) for name in module._flat_weights_names]


def _write_flat(module: nn.RNNBase, value: list[Any]) -> None:
    module.__dict__["_flat_weights"] = value


_flat_weights = property(_read_flat, _write_flat)
"""Recurrent layers compute from a second list of their own tensors, which must give the adapted ones too."""
