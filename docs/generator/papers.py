"""Columns of papers' tables whose methods are compared here too, as printed, in percent or the metric's own unit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column: the label of a method in our results, and the score the paper prints for it."""

    source: str
    setting: str
    scores: dict[str, float]


COLUMNS = {
    "stsb": (
        Column(
            "VeRA, arXiv 2310.11454, table 2", "RoBERTa-base, GLUE STS-B",
            {"Full": 91.2, "BitFit": 90.8, "LoRA": 91.5, "VeRA": 90.7},
        ),
        Column(
            "VeRA, arXiv 2310.11454, table 2", "RoBERTa-large, GLUE STS-B",
            {"Pfeiffer": 92.1, "Houlsby": 91.0, "LoRAFA": 92.0, "LoRA": 92.3, "VeRA": 91.7},
        ),
    ),
    "trec": (
        Column(
            "VeRA, arXiv 2310.11454, table 2", "RoBERTa-base, GLUE average",
            {"Full": 85.2, "BitFit": 85.4, "LoRA": 86.6, "VeRA": 85.2},
        ),
        Column(
            "VeRA, arXiv 2310.11454, table 2", "RoBERTa-large, GLUE average",
            {"Pfeiffer": 87.6, "Houlsby": 86.8, "LoRAFA": 87.7, "LoRA": 87.8, "VeRA": 87.8},
        ),
    ),
    "cifar10": (
        Column(
            "VeRA, arXiv 2310.11454, table 5", "ViT-B, CIFAR-100",
            {"LinearProbe": 77.7, "Full": 86.5, "LoRA": 85.9, "VeRA": 84.8},
        ),
        Column(
            "VeRA, arXiv 2310.11454, table 5", "ViT-L, CIFAR-100",
            {"LinearProbe": 79.4, "Full": 86.8, "LoRA": 87.0, "VeRA": 87.5},
        ),
    ),
    "instructlab": (
        Column(
            "VeRA, arXiv 2310.11454, table 3", "GPT-2 medium, E2E, BLEU",
            {"Full": 68.2, "LinAdapter": 68.9, "Houlsby": 67.3, "DyLoRA": 69.2, "AdaLoRA": 68.2, "LoRA": 68.9,
             "VeRA": 70.1},
        ),
        Column(
            "DoRA, arXiv 2402.09353, table 5", "LLaMA-7B, MT-Bench",
            {"LoRA": 5.1, "DoRA": 5.5, "VeRA": 4.3},
        ),
    ),
}  # fmt: skip
