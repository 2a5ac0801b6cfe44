"""The catalogue: one file per method, one package per site. Importing this package registers all of them."""

from inlay.methods.gradient.galore import GaLore
from inlay.methods.hidden.adaptformer import AdaptFormer
from inlay.methods.hidden.compacter import Compacter
from inlay.methods.hidden.consreft import ConsReFT
from inlay.methods.hidden.direft import DiReFT
from inlay.methods.hidden.houlsby import Houlsby
from inlay.methods.hidden.kronab import KronAB
from inlay.methods.hidden.linadapter import LinAdapter
from inlay.methods.hidden.llmparallel import LLMParallel
from inlay.methods.hidden.llmseries import LLMSeries
from inlay.methods.hidden.lobireft import LobiReFT
from inlay.methods.hidden.loreft import LoReFT
from inlay.methods.hidden.noreft import NoReFT
from inlay.methods.hidden.paralleladapter import ParallelAdapter
from inlay.methods.hidden.pfeiffer import Pfeiffer
from inlay.methods.hidden.residualparallel import ResidualParallel
from inlay.methods.hidden.residualseries import ResidualSeries
from inlay.methods.hidden.sct import SCT
from inlay.methods.hidden.ssf import SSF
from inlay.methods.hidden.stateoffset import StateOffset
from inlay.methods.input.visualprompt import VisualPrompt
from inlay.methods.output.linearprobe import LinearProbe
from inlay.methods.output.nearestneighbours import NearestNeighbours
from inlay.methods.output.sidetuning import SideTuning
from inlay.methods.output.unipt import UniPT
from inlay.methods.schedule.adalora import AdaLoRA
from inlay.methods.schedule.deltalora import DeltaLoRA
from inlay.methods.schedule.dylora import DyLoRA
from inlay.methods.schedule.ist import IST
from inlay.methods.schedule.longlora import LongLoRA
from inlay.methods.schedule.relora import ReLoRA
from inlay.methods.schedule.tfew import TFew
from inlay.methods.tokens.cocoop import CoCoOp
from inlay.methods.tokens.coop import CoOp
from inlay.methods.tokens.dept import DePT
from inlay.methods.tokens.llamaadapter import LLaMAAdapter
from inlay.methods.tokens.maple import MaPLe
from inlay.methods.tokens.pgn import PGN
from inlay.methods.tokens.prefixtuning import PrefixTuning
from inlay.methods.tokens.prompttuning import PromptTuning
from inlay.methods.tokens.ptuning import PTuning
from inlay.methods.tokens.ptuningv2 import PTuningV2
from inlay.methods.tokens.vpt import VPT
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
    "BOFT", "ETHER", "EVA", "IA3", "IST", "NOLA", "OFT", "PEQA", "PGN", "SCT", "SDT", "SSF", "SVFT", "VPT", "AdaLoRA",
    "AdaptFormer", "BitFit", "CoCoOp", "CoOp", "Compacter", "ConsReFT", "CorDA", "DePT", "DeltaLoRA", "DiReFT",
    "DiaBlo", "DoRA", "DyLoRA", "ETHERPlus", "Full", "GLoRA", "GaLore", "Houlsby", "KRAdapter", "KronA", "KronAB",
    "LLMParallel", "LLMSeries", "LLaMAAdapter", "LinAdapter", "LinearProbe", "LoHa", "LoKr", "LoRA", "LoRAFA", "LoRASB",
    "LoRAXS", "LoReFT", "LobiReFT", "LongLoRA", "MaPLe", "NearestNeighbours", "NoReFT", "NormTuning", "PTuning",
    "PTuningV2", "ParallelAdapter", "Pfeiffer", "PiSSA", "PrefixTuning", "PromptTuning", "ReLoRA", "ResidualParallel",
    "ResidualSeries", "RoAd", "SideTuning", "StateOffset", "TFew", "UniPT", "VBLoRA", "VeRA", "VisualPrompt",
    "WeightNorm",
]  # fmt: skip
