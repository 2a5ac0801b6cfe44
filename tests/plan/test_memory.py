"""The predicted peak against the allocator's own record of a real training step, on real models."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import inlay
import inlay.models
from inlay.plan import plan

CASES = [
    ("minilm", "text-classification", "lora(r=8)", ["attn.q", "attn.v"], 16, 64, None),
    ("minilm", "text-classification", "bitfit", None, 8, 128, None),
    ("minilm", "text-classification", "full", None, 8, 64, None),
    ("minilm", "text-classification", "prompttuning", None, 8, 64, None),
    ("smollm2-135m-instruct", "causal-lm", "dora", ["attn.q", "attn.v"], 1, 64, None),
    ("minilm", "text-classification", "lora(r=8)", ["all-linear"], 16, 64, "nf4"),
    ("minilm", "text-classification", "lora(r=8)", ["all-linear"], 8, 64, "int4"),
    ("minilm", "text-classification", "peqa", None, 8, 64, "int8"),
    ("smollm2-135m-instruct", "causal-lm", "lora(r=8)", ["attn.q", "attn.v"], 1, 64, "nf4"),
]


def measured_peak(model, batch) -> int:
    """Peak of allocated bytes during two steps (the first has no moments yet), on top of what the model holds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        optimizer = torch.optim.AdamW(trained)
        for _ in range(2):
            model(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    events = sorted(
        (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak + sum(held.values())


@pytest.mark.parametrize(("name", "task", "method", "where", "rows", "length", "quantize"), CASES)
def test_the_predicted_peak_is_within_15_percent_of_the_measured(name, task, method, where, rows, length, quantize):
    labels = 2 if task == "text-classification" else None
    opened = inlay.models.open(name, task, num_labels=labels, quantize=quantize)
    model = opened.model.train()
    inlay.adapt(model, method, where)

    def batch():
        ids = torch.full((rows, length), 7)
        return {"input_ids": ids, "labels": ids if task == "causal-lm" else torch.zeros(rows, dtype=torch.long)}

    predicted = plan(name, method, where, batch=rows, length=length, quantize=quantize).peak_training_bytes
    assert predicted == pytest.approx(measured_peak(model, batch), rel=0.15)
