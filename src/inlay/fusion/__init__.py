"""Logits fusion: small experts steer a larger frozen decoder while it generates, one rule per file."""

from inlay.fusion.dexperts import DExperts
from inlay.fusion.dynamic import DynamicFusion
from inlay.fusion.experts import Expert
from inlay.fusion.fused import Fusion, fuse
from inlay.fusion.proxy import ProxyTuning
from inlay.fusion.rule import Rule
from inlay.fusion.voice import Acting

__all__ = ["Acting", "DExperts", "DynamicFusion", "Expert", "Fusion", "ProxyTuning", "Rule", "fuse"]
