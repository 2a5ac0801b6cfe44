"""The catalogue: one file per method, one package per site. Importing this package registers all of them."""

from inlay.methods.gradient.galore import GaLore
from inlay.methods.hidden.direft import DiReFT
from inlay.methods.hidden.houlsby import Houlsby
from inlay.methods.hidden.kronab import KronAB
from inlay.methods.hidden.linadapter import LinAdapter
from inlay.methods.hidden.loreft import LoReFT
from inlay.methods.hidden.paralleladapter import ParallelAdapter
from inlay.methods.hidden.pfeiffer import Pfeiffer
from inlay.methods.hidden.ssf import SSF
from inlay.methods.hidden.stateoffset import StateOffset
from inlay.methods.output.linearprobe import LinearProbe
from inlay.methods.schedule.adalora import AdaLoRA
from inlay.methods.schedule.deltalora import DeltaLoRA
from inlay.methods.schedule.dylora import DyLoRA
from inlay.methods.schedule.ist import IST
from inlay.methods.schedule.longlora import LongLoRA
from inlay.methods.schedule.relora import ReLoRA
from inlay.methods.tokens.prefixtuning import PrefixTuning
from inlay.methods.tokens.prompttuning import PromptTuning
from inlay.methods.weight.bitfit import BitFit
from inlay.methods.weight.boft import BOFT
from inlay.methods.weight.corda import CorDA
from inlay.methods.weight.diablo import DiaBlo
from inlay.methods.weight.dora import DoRA
from inlay.methods.weight.ether import ETHER
from inlay.methods.weight.etherplus import ETHERPlus
from inlay.methods.weight.eva import EVA
from inlay.methods.weight.full import Full
from inlay.methods.weight.glora import GLoRA
from inlay.methods.weight.ia3 import IA3
from inlay.methods.weight.kradapter import KRAdapter
from inlay.methods.weight.krona import KronA
from inlay.methods.weight.loha import LoHa
from inlay.methods.weight.lokr import LoKr
from inlay.methods.weight.lora import LoRA
from inlay.methods.weight.lorafa import LoRAFA
from inlay.methods.weight.lorasb import LoRASB
from inlay.methods.weight.loraxs import LoRAXS
from inlay.methods.weight.nola import NOLA
from inlay.methods.weight.normtuning import NormTuning
from inlay.methods.weight.oft import OFT
from inlay.methods.weight.peqa import PEQA
from inlay.methods.weight.pissa import PiSSA
from inlay.methods.weight.road import RoAd
from inlay.methods.weight.sdt import SDT
from inlay.methods.weight.svft import SVFT
from inlay.methods.weight.vblora import VBLoRA
from inlay.methods.weight.vera import VeRA
from inlay.methods.weight.weightnorm import WeightNorm

__all__ = [
    "BOFT", "ETHER", "EVA", "IA3", "IST", "NOLA", "OFT", "PEQA", "SDT", "SSF", "SVFT", "AdaLoRA", "BitFit", "CorDA",
    "DeltaLoRA", "DiReFT", "DiaBlo", "DoRA", "DyLoRA", "ETHERPlus", "Full", "GLoRA", "GaLore", "Houlsby",
    "KRAdapter", "KronA", "KronAB", "LinAdapter", "LinearProbe", "LoHa", "LoKr", "LoRA", "LoRAFA", "LoRASB",
    "LoRAXS", "LoReFT", "LongLoRA", "NormTuning", "ParallelAdapter", "Pfeiffer", "PiSSA", "PrefixTuning",
    "PromptTuning", "ReLoRA", "RoAd", "StateOffset", "VBLoRA", "VeRA", "WeightNorm",
]  # fmt: skip
