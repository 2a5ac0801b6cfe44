"""Exact parameter counts of the prompt-learning papers on CLIP ViT-B/16, from shapes alone."""

import pytest

from inlay.plan import plan

COUNTS = [
    ("coop", 1000, 8_192),  # 16 · 512, whatever the number of classes
    ("coop(tokens=4)", 10, 2_048),
    ("coop(classes=1000)", 1000, 8_192_000),  # CSC on ImageNet
    ("cocoop(tokens=4)", 10, 35_360),
    ("maple", 10, 3_555_072),
]


@pytest.mark.parametrize(("method", "classes", "count"), COUNTS)
def test_counts(method, classes, count):
    assert plan("clip-vit-b16", method, labels=classes, memory=False).adapter_parameters == count


@pytest.mark.slow
def test_the_memory_of_a_step_is_predicted():
    """CoCoOp's text tower reads a prompt per image and class."""
    coop, cocoop = (plan("clip-vit-b16", m, labels=10, batch=4).peak_training_bytes for m in ("coop", "cocoop"))
    assert coop is not None
    assert cocoop is not None
    assert cocoop > 1.2 * coop
