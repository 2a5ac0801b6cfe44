"""inlay: adapt frozen foundation models with any parameter-efficient method."""

from inlay.core.active import delete, detach, disabled, penalty, route, step, use
from inlay.core.adapter import Adapter, adapt
from inlay.core.calibrate import calibrate
from inlay.core.checkpoint import load, save
from inlay.core.merge import merge, unmerge
from inlay.fusion import Acting, DExperts, DynamicFusion, Expert, ProxyTuning, fuse
from inlay.interop import export_peft
from inlay.models.loftq import loftq, loftq_base
from inlay.optim import optimizer

__version__ = "0.1.0"

__all__ = [
    "Acting", "Adapter", "DExperts", "DynamicFusion", "Expert", "ProxyTuning", "adapt", "calibrate", "delete",
    "detach", "disabled", "export_peft", "fuse", "load", "loftq", "loftq_base", "merge", "optimizer", "penalty",
    "route", "save", "step", "unmerge", "use",
]  # fmt: skip
