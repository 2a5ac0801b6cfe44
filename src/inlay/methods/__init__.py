"""The catalogue: one file per method, one package per site. Importing this package registers all of them."""

from inlay.methods.output.linearprobe import LinearProbe
from inlay.methods.weight.bitfit import BitFit
from inlay.methods.weight.dora import DoRA
from inlay.methods.weight.full import Full
from inlay.methods.weight.ia3 import IA3
from inlay.methods.weight.lora import LoRA
from inlay.methods.weight.normtuning import NormTuning
from inlay.methods.weight.vera import VeRA

__all__ = ["IA3", "BitFit", "DoRA", "Full", "LinearProbe", "LoRA", "NormTuning", "VeRA"]
