"""A small Mamba, made here, and what methods for state spaces do to it: `make mamba`, or one of its commands.

    python benchmarks/mamba.py pretrain     # tokenizer and MambaForCausalLM on novels, and what it has learnt
    python benchmarks/mamba.py adapt        # methods compared on plays, `recipes/mamba.yaml`
    python benchmarks/mamba.py choice       # what SDT chooses there, against the paper's warm-up

No package registry carries a Mamba that was trained on text, so this one is trained from nothing, by `inlay train` with
`full`: 0.7 M parameters, some minutes of one CPU core. It is a test object, not a language model. Everything lies in
`runs/mamba`; after an interruption the same command goes on from there. Tables go to `results/mamba`.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import inlay.data
import inlay.models
from inlay.compare import compare
from inlay.core.export import export
from inlay.core.files import write_text
from inlay.methods import Full, LoRA
from inlay.recipe import CompareRecipe, Recipe, load_recipe
from inlay.report import markdown, write_csv, write_json
from inlay.train import train
from inlay.train.progress import Bar

ROOT = Path(__file__).resolve().parent.parent
RUN, RESULTS = ROOT / "runs" / "mamba", ROOT / "results" / "mamba"
NOVELS = ("Emma", "Persuasion", "Sense and Sensibility", "The Ball", "The Wisdom", "The Man Who", "Stories to Tell")
PLAYS = ("Hamlet", "Macbeth")
VOCABULARY, ROW = 2048, 128
SHAPE: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "state_size": 8}
TRAINING: dict[str, Any] = {
    "batch": 8,
    "steps": 700,
    "learning_rate": 4e-3,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "max_length": ROW,
    "evaluate_every": 175,
    "checkpoint_every": 25,
}


# ---------------------------------------------------------------------- texts
def texts() -> None:
    """Novels and plays as data sets of their own: files of whole books, told apart by their first line."""
    splits = inlay.data.load("gutenberg").splits
    books = {split: rows.column("text") for split, rows in splits.items()}
    caesar = picked(books["train"], ("Julius Caesar",))[0]
    write(RUN / "novels", train=picked(books["train"], NOVELS), validation=[picked(books["validation"], ("Parent",))[0]
          [:60_000]], test=picked(books["test"], ("Alice",)))  # fmt: skip
    write(
        RUN / "plays", train=picked(books["train"], PLAYS), validation=[caesar[:20_000]], test=[caesar[20_000:60_000]]
    )


def picked(books: list[str], titles: tuple[str, ...]) -> list[str]:
    return [book for book in books if any(title in book.partition("\n")[0] for title in titles)]


def write(folder: Path, **splits: list[str]) -> None:
    for split, found in splits.items():
        assert found, f"no book for {folder.name}/{split}"
        write_text(folder / f"{split}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in found))


def read(name: str) -> inlay.data.Data:
    return inlay.data.load(str(RUN / name), task="causal-lm")


# ---------------------------------------------------------------------- the model
def untrained() -> Path:
    """The folder of a tokenizer learnt from the novels and of a Mamba with random weights, seed 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

    folder = RUN / "untrained"
    if (folder / "config.json").exists():
        return folder
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(read("novels").splits["train"].column("text"), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    # transformers scans by mamba.py where that is installed (`pip install mambapy`), several times faster on a CPU
    config = MambaConfig(vocab_size=len(tokenizer), use_mambapy=True, **SHAPE)
    MambaForCausalLM(config).save_pretrained(folder)
    return folder


def pretrain() -> None:
    """Train, write the model's folder, and say what it has learnt."""
    texts()
    recipe = Recipe(
        model=str(untrained()),
        data=str(RUN / "novels"),
        task="causal-lm",
        method="full",
        output=str(RUN / "pretraining"),
        **TRAINING,
    )
    trained = train(recipe, Bar())
    folder = RUN / "model"
    if not (folder / "config.json").exists():
        export(trained.adapter.model, folder)
        inlay.models.open(recipe.model, "causal-lm").processor.save_pretrained(folder)
    publish(trained.seconds, trained.steps)


# ---------------------------------------------------------------------- what it has learnt
def rows(name: str, split: str, length: int) -> list[Tensor]:
    """The whole rows of so many tokens."""
    data = inlay.data.prepare(read(name), inlay.models.open(RUN / "model").processor, max_length=length).splits[split]
    return [ids for i in range(len(data)) if len(ids := data[i]["input_ids"]) == length]


@torch.no_grad()
def loss(model: Any, batch: list[Tensor]) -> float:
    """Mean cross-entropy of a token given those before it in its row, in nats."""
    parts = torch.stack(batch).split(32)
    return sum(float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in parts) / len(batch)


def publish(seconds: float, steps: int) -> None:
    """The table of losses on a book by an author that training has not seen."""
    model = inlay.models.open(RUN / "model", "causal-lm").model
    test, seen = (rows("novels", split, ROW) for split in ("test", "train"))
    counts = torch.bincount(torch.cat(seen), minlength=VOCABULARY) + 1.0
    unigram = -(counts / counts.sum()).log()
    generator = torch.Generator().manual_seed(0)
    found = {
        "a uniform guess": math.log(VOCABULARY),
        "how often each token is in the novels": float(torch.stack([unigram[ids[1:]] for ids in test]).mean()),
        "this Mamba, on rows whose tokens are shuffled": loss(
            model, [ids[torch.randperm(ROW, generator=generator)] for ids in test]
        ),
        "this Mamba": loss(model, test),
    }
    settings = {"rows": len(test), "parameters": sum(p.numel() for p in model.parameters()), "steps": steps,
                "seconds": round(seconds), "training": TRAINING, "torch": torch.__version__}  # fmt: skip
    write_text(RESULTS / "pretraining.json", json.dumps({"loss": found, **settings}, indent=1) + "\n")
    lines = [
        "# A small Mamba, made here",
        "",
        f"{settings['parameters']:,} parameters, {steps} steps of {TRAINING['batch']} rows of {ROW} tokens of novels",
        f"(Austen, Chesterton, Bryant), {seconds:.0f} s of wall time. Loss of a token in nats, on {len(test)} rows of",
        "*Alice's Adventures in Wonderland*, whose author training has not seen:",
        "",
        "| prediction from | loss |",
        "|---|--:|",
        *(f"| {name} | {value:.3f} |" for name, value in found.items()),
    ]
    write_text(RESULTS / "pretraining.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


# ---------------------------------------------------------------------- adapting it
def adapt() -> None:
    """The comparison of `recipes/mamba.yaml`: what is trained already is not trained again."""
    recipe = load_recipe(ROOT / "recipes" / "mamba.yaml", CompareRecipe)
    assert recipe.max_length is not None
    base = loss(inlay.models.open(RUN / "model", "causal-lm").model, rows("plays", "test", recipe.max_length))
    result = compare(recipe)
    write_json(replace(result, cells=[replace(cell, curve=[]) for cell in result.cells]), RESULTS / "results.json")
    write_csv(result, RESULTS / "results.csv")
    notes = "\n".join(f"- {note}" for note in [*result.notes, f"the base as it is: perplexity {math.exp(base):.1f}"])
    write_text(RESULTS / "table.md", f"# {result.title}\n\n{markdown(result)}\n{notes}\n")


# ---------------------------------------------------------------------- how SDT chooses
def choice(steps: int = 60, batches: int = 8) -> None:
    """SDT's importance of channels from summed gradients, against the paper's: the change in a warm-up with AdamW."""
    model: Any = inlay.models.open(RUN / "model", "causal-lm").model
    ids = torch.stack(rows("plays", "train", 64))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    fed = [{"input_ids": ids[part], "labels": ids[part]} for part in order.split(8)]
    chosen = {}
    blocks = [block.mixer for block in model.backbone.layers]
    for count in (batches, 4 * batches):
        model.requires_grad_(False)
        for mixer in blocks:
            mixer.A_log.requires_grad_(True).grad = None
        for batch in fed[:count]:
            model(**batch).loss.backward()
        chosen[f"{count} batches of gradients"] = scores([mixer.A_log.grad for mixer in blocks])
    adapter = inlay.adapt(model, [Full().on("mixer.A"), LoRA().on("mixer.out")])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=4e-3)
    for batch in fed[:steps]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changes = [lv.method.value - lv.site.parameter for lv in adapter.levels if isinstance(lv.method, Full)]
    warm = scores([change.detach() for change in changes])
    inlay.detach(model)
    lines = ["# What SDT chooses, from gradients and from a warm-up", "",
             f"Channels of the small Mamba on plays, against a warm-up of {steps} AdamW steps as in the paper: how",
             "their importance correlates in rank, and how many of the upper tenth agree (by chance a tenth of them).",
             "",
             "| importance from | layer | rank correlation | of the upper tenth |", "|---|--:|--:|--:|"]  # fmt: skip
    for name, found in chosen.items():
        for i, (a, b) in enumerate(zip(found, warm, strict=True)):
            ranks = torch.stack([s.argsort().argsort().double() for s in (a, b)])
            k = len(a) // 10
            same = len({*a.topk(k).indices.tolist()} & {*b.topk(k).indices.tolist()})
            lines.append(f"| {name} | {i} | {float(torch.corrcoef(ranks)[0, 1]):.2f} | {same} of {k} |")
    write_text(RESULTS / "choice.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def scores(tensors: list[Tensor]) -> list[Tensor]:
    return [t.square().sum(1) for t in tensors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["pretrain", "adapt", "choice"])
    {"pretrain": pretrain, "adapt": adapt, "choice": choice}[parser.parse_args().command]()


if __name__ == "__main__":
    main()
