"""Proxy-tuning on real text: a small tuned and untuned pair steers a larger frozen decoder of the same vocabulary.

    python benchmarks/proxy.py          # or: make proxy

The larger one is SmolLM2-135M-Instruct. No registry carries a smaller model of its vocabulary, so one is made: four of
its thirty blocks between its own embedding and its own norm and head, taught for a few minutes to give the hidden
states and the next words that the whole gives and reads, on instructions and books. That is the untuned small model.
Its tuned form is the same model with a LoRA trained on worked sums (GSM8K), switched on and off: one model is expert
and anti-expert. The larger model tuned directly has the same LoRA on the same rows for as many steps.

What is finished lies in runs/proxy and is not made again; a training that was killed goes on. Table and data go to
results/proxy. One CPU core, about twelve minutes, counted as the time that the process had the core.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay
import inlay.data
import inlay.models
from inlay.core.files import write_text
from inlay.data.documents import cut
from inlay.fusion import Fusion, Rule
from inlay.recipe import Recipe
from inlay.train import train
from inlay.work import Shared, Work, open_work

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUN = ROOT / "results" / "proxy", ROOT / "runs" / "proxy"
LARGE, TASK = "smollm2-135m-instruct", "gsm8k"
BLOCKS = (0, 10, 20, 29)
"""The blocks of the larger model that the small one begins with."""
LENGTH, BATCH, ROWS, PASSES = 128, 8, 320, 4
"""Tokens per row, rows per step, and rows and passes of the small model's making."""
TEST, PIECE = 32, 4
"""Questions of the test, and how many are scored at once."""


# ---------------------------------------------------------------------- the small model
def small() -> Path:
    """The folder of the small model, made on first use."""
    folder = RUN / "small"
    if (folder / "made.json").exists():
        return folder
    began, opened = time.process_time(), inlay.models.open(LARGE, "causal-lm")
    rows = general(opened.processor)
    teacher: Any = opened.model.eval().requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        goals = torch.cat(
            [teacher.model(input_ids=part, use_cache=False).last_hidden_state for part in rows.split(BATCH)]
        )
    student = shallow(teacher)
    course = teach(student, rows, goals.bfloat16())
    folder.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(folder)
    opened.processor.save_pretrained(folder)
    about = {"blocks": BLOCKS, "rows": ROWS, "tokens": LENGTH, "passes": PASSES, "course": course,
             "cpu_seconds": round(time.process_time() - began)}  # fmt: skip
    write_text(folder / "made.json", json.dumps(about, indent=1) + "\n")
    return folder


def general(tokenizer: Any) -> Tensor:
    """Rows (n, LENGTH) of instructions and of books, half and half; no sums among them."""
    chats = inlay.data.load("instructlab", limit={"train": 3 * ROWS})
    prepared: Any = inlay.data.prepare(chats, tokenizer, LENGTH).splits["train"]
    whole = [row for i in range(len(prepared)) if len(row := prepared[i]["input_ids"]) == LENGTH][: ROWS // 2]
    books = inlay.data.load("gutenberg").splits["train"].column("text")
    found = [row for row in cut(tokenizer, books, LENGTH) if len(row) == LENGTH]
    chosen = found[:: len(found) // (ROWS - len(whole))][: ROWS - len(whole)]
    return torch.tensor([*map(list, whole), *chosen])


def shallow(model: Any) -> Any:
    """A model of some of the blocks, with the embedding, norm and head of the whole."""
    config = type(model.config).from_dict(model.config.to_dict() | {"num_hidden_layers": len(BLOCKS)})
    made = type(model)(config)
    made.load_state_dict({name: t for name, t in model.state_dict().items() if ".layers." not in name}, strict=False)
    for layer, block in zip(made.model.layers, BLOCKS, strict=True):
        layer.load_state_dict(model.model.layers[block].state_dict())
    made.tie_weights()
    return made


def teach(student: Any, rows: Tensor, goals: Tensor) -> list[dict[str, float]]:
    """Train the blocks: the whole's last hidden states, and the next word at every fourth place."""
    student.requires_grad_(False)
    student.model.layers.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.model.layers.parameters(), lr=1e-3, weight_decay=0.0)
    generator, course = torch.Generator().manual_seed(0), []
    unit = goals.float().var()
    total = PASSES * (len(rows) // BATCH)
    orders = [torch.randperm(len(rows), generator=generator) for _ in range(PASSES)]
    parts = [part for order in orders for part in order.split(BATCH)][:total]
    for step, part in enumerate(parts):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min((step + 1) / 10, (total - step) / (total - 9))
        ids, spots = rows[part], torch.randint(4, (1,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = student.model(input_ids=ids, use_cache=False).last_hidden_state
            near = F.mse_loss(hidden.float(), goals[part].float()) / unit
            words = student.lm_head(hidden[:, spots:-1:4]).float()
        told = F.cross_entropy(words.flatten(0, 1), ids[:, 1:][:, spots::4].flatten())
        (near + told).backward()
        near, told = near.detach(), told.detach()
        nn.utils.clip_grad_norm_(student.model.layers.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == total - 1:
            course.append({"step": step, "hidden": round(float(near), 4), "words": round(float(told), 4)})
            print(course[-1], flush=True)
    return course


# ---------------------------------------------------------------------- tuning
def recipe(name: str, model: str) -> Recipe:
    """The same LoRA on the same rows, for either size."""
    return Recipe(
        model=model, data=TASK, method="lora(r=8)", where=["all-linear"], max_length=LENGTH, batch=BATCH, steps=30,
        limit={"train": 240, "validation": 8, "test": TEST}, precision="autocast", evaluate_every=1000,
        learning_rate=1e-3, evaluate_batch=PIECE, output=str(RUN / name),
    )  # fmt: skip


def tuned(name: str, model: str) -> tuple[Work, float]:
    """The model with the LoRA on it, and the CPU seconds of its training."""
    made = recipe(name, model)
    clock, began = RUN / f"{name}.json", time.process_time()
    shared = Shared()
    train(made, shared=shared)
    if not clock.exists():
        write_text(clock, json.dumps({"cpu_seconds": round(time.process_time() - began)}) + "\n")
    work = open_work(made, made.seed, shared)
    return work, json.loads(clock.read_text(encoding="utf-8"))["cpu_seconds"]


# ---------------------------------------------------------------------- measuring
def batches(work: Work) -> Iterator[dict[str, Tensor]]:
    """The test rows, padded on the right."""
    rows = list(range(len(work.rows("test"))))
    for start in range(0, len(rows), PIECE):
        yield work.batch("test", rows[start : start + PIECE])


def scored(work: Work, speak: Callable[[dict[str, Tensor], Tensor], Tensor]) -> dict[str, Any]:
    """Loss, perplexity and accuracy of the answers' tokens; `speak` gives log-probabilities at the places asked for."""
    loss, right, count = 0.0, 0.0, 0
    began = time.process_time()
    for batch in batches(work):
        goals = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        at = goals != -100
        log_p = speak(batch, at)
        loss += float(F.nll_loss(log_p, goals[at], reduction="sum"))
        right += float((log_p.argmax(-1) == goals[at]).sum())
        count += int(at.sum())
    mean, seconds = loss / count, round(time.process_time() - began, 1)
    found = {"token_accuracy": round(right / count, 4), "tokens": count, "cpu_seconds": seconds}
    if mean == math.inf:  # DExperts gives no probability at all to what it rules out
        return {"loss": None, "perplexity": None, **found}
    return {"loss": round(mean, 4), "perplexity": round(math.exp(mean), 3), **found}


def fused(fusion: Fusion) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda batch, at: fusion.log_probs(batch["input_ids"], batch["attention_mask"], at)


def plain(speaker: nn.Module | inlay.Acting) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """One model by itself."""
    return fused(inlay.fuse(speaker, inlay.Expert(speaker, alpha=0.0)))


def measured() -> dict[str, Any]:
    """Every row of the table; rows that an interrupted call has measured are read."""
    kept = RUN / "rows.json"
    done: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    folder = small()
    little, little_seconds = tuned("tuned-small", str(folder))
    large, large_seconds = tuned("tuned-large", LARGE)
    base, direct = inlay.Acting(large.model), inlay.Acting(large.model, "default")
    anti, expert = inlay.Acting(little.model), inlay.Acting(little.model, "default")

    def fusion(rule: Rule, alpha: float = 1.0) -> Fusion:
        return inlay.fuse(base, inlay.Expert(expert, anti, alpha), rule, large.opened.processor)

    rows = {
        "base": plain(base), "small, untuned": plain(anti), "small, tuned": plain(expert),
        "base + proxy-tuning, α = 0.5": fused(fusion(inlay.ProxyTuning(), 0.5)),
        "base + proxy-tuning, α = 1": fused(fusion(inlay.ProxyTuning())),
        "base + DExperts, top-p 0.99, α = 1": fused(fusion(inlay.DExperts(top_p=0.99))),
        "base, tuned directly (LoRA)": plain(direct),
    }  # fmt: skip
    for name, speak in rows.items():
        if name not in done:
            done[name] = scored(large, speak)
            write_text(kept, json.dumps(done, indent=1) + "\n")
            print(name, done[name], flush=True)
    if "said" not in done:
        done["said"] = said(large, {"base": base, "proxy-tuned": fusion(inlay.ProxyTuning()), "tuned directly": direct})
        write_text(kept, json.dumps(done, indent=1) + "\n")
    seconds = {"making the small model": json.loads((folder / "made.json").read_text())["cpu_seconds"],
               "tuning the small one": little_seconds, "tuning the larger one": large_seconds}  # fmt: skip
    sizes = {"small": numbers(little.model), "larger": numbers(large.model)}
    return {"rows": {name: done[name] for name in rows}, "said": done["said"], "cpu_seconds": seconds, "sizes": sizes}


def numbers(model: nn.Module) -> dict[str, int]:
    """Numbers in all, and in the blocks; adapters are left out."""
    own = [(name, p.numel()) for name, p in model.named_parameters() if not name.startswith("inlay.")]
    return {"all": sum(n for _, n in own), "blocks": sum(n for name, n in own if ".layers." in name)}


def said(work: Work, speakers: dict[str, Any]) -> dict[str, str]:
    """The greedy answer to the first test question, 48 tokens of it."""
    batch = work.batch("test", [0])
    prompt = batch["input_ids"][:, : int((batch["labels"][0] != -100).int().argmax())]
    found = {}
    for name, speaker in speakers.items():
        whole = speaker if isinstance(speaker, Fusion) else inlay.fuse(speaker, inlay.Expert(speaker, alpha=0.0))
        out = whole.generate(prompt, torch.ones_like(prompt), do_sample=False, max_new_tokens=48)
        found[name] = work.opened.processor.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    return found


# ---------------------------------------------------------------------- the table
def main() -> None:
    result = measured()
    rows = result["rows"]
    gap = rows["base"]["loss"] - rows["base, tuned directly (LoRA)"]["loss"]
    lines = ["| model | perplexity | token accuracy | gap closed |", "|---|---|---|---|"]
    for name, row in rows.items():
        loss, steered = row["loss"], not name.startswith("small")
        share = f"{100 * (rows['base']['loss'] - loss) / gap:.0f} %" if steered and loss is not None else ""
        perplexity = "∞" if loss is None else f"{row['perplexity']:.2f}"
        lines.append(f"| {name} | {perplexity} | {100 * row['token_accuracy']:.1f} % | {share} |")
    sizes, seconds = result["sizes"], result["cpu_seconds"]
    spent = ", ".join(f"{name} {n}" for name, n in seconds.items())
    notes = [
        f"Made by `make proxy`; nothing here is written by hand. {rows['base']['tokens']:,.0f} answer tokens of {TEST} "
        f"questions of GSM8K's test rows, prompt and answer cut to {LENGTH} tokens.",
        f"The larger model is SmolLM2-135M-Instruct ({sizes['larger']['blocks']:,} numbers in its blocks). The small "
        f"one has {len(BLOCKS)} of its 30 blocks ({sizes['small']['blocks']:,}) and the same embedding. It was taught "
        "for a few minutes on instructions and books, because no registry carries a smaller model of this vocabulary. "
        "It is far worse than models that are shipped as small ones, so this shows that the way works, not what a 7B "
        "proxy does for a 70B model.",
        "Both sizes were tuned by the same LoRA (r = 8, all linear layers) on the same 240 rows for 30 steps. Gap "
        "closed: share of the loss that direct tuning takes off the base's. DExperts rules out tokens that the texts "
        "have, whose loss is then infinite; it is a rule for writing, not for scoring.",
        f"CPU seconds of one core: {spent}.",
        "The first test question, greedily: " + "; ".join(f"*{k}*: {json.dumps(v)}" for k, v in result["said"].items()),
    ]
    write_text(RESULTS / "results.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    body = "\n".join(f"- {note}" for note in notes)
    write_text(RESULTS / "table.md", "# A small pair steers a larger decoder\n\n" + "\n".join(lines) + f"\n\n{body}\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
