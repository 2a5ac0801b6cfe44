"""Writes `pyreft.safetensors`: what pyreft 0.1.0 computes, for `test_hidden.py` to compare with.

Run by hand in an environment of its own, since pyreft needs transformers 4.45:
`pip install pyreft==0.1.0 pyvene==0.1.8 transformers==4.45.1 torch && python tests/papers/pyreft_reference.py`
"""

from __future__ import annotations

import json
from pathlib import Path

import pyreft
import torch
from pyreft.dataset import get_intervention_locations
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

BASE = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.2, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LAYERS, RANK, POSITIONS = [0, 2], 3, "f3+l2"
LENGTHS = [9, 5, 3]  # the last one is too short for f3+l2
INTERVENTIONS = {
    "loreft": pyreft.LoreftIntervention, "direft": pyreft.NodireftIntervention, "noreft": pyreft.NoreftIntervention,
    "consreft": pyreft.ConsreftIntervention, "lobireft": pyreft.LobireftIntervention,
    "rotated": pyreft.DireftIntervention,
}  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**BASE, attn_implementation="eager")).eval()
    tensors = {f"base.{name}": t.clone() for name, t in model.state_dict().items()}
    # as pyreft's data sets do it: one padding token in front, which the positions that do not exist point at
    ids = torch.zeros(len(LENGTHS), 1 + max(LENGTHS), dtype=torch.long)
    for row, n in zip(ids, LENGTHS, strict=True):
        row[1 : 1 + n] = torch.randint(3, BASE["vocab_size"], (n,))
    mask = (ids != 0).long()
    tensors |= {"ids": ids, "mask": mask}
    for kind, intervention in INTERVENTIONS.items():
        for tied in (True, False):
            tensors |= {f"{kind}.{tied}.{k}": t for k, t in case(model, ids, mask, intervention, tied).items()}
    about = {"base": BASE, "layers": LAYERS, "rank": RANK, "positions": POSITIONS}
    save_file(tensors, Path(__file__).with_name("pyreft.safetensors"), metadata={"about": json.dumps(about)})


def case(model, ids, mask, intervention, tied):
    layers = LAYERS if tied else LAYERS * 2  # pyreft: first the prefixes of all layers, then the suffixes
    options = {"embed_dim": BASE["hidden_size"], "low_rank_dimension": RANK, "dtype": torch.float32, "add_bias": False}
    parts = [{"layer": n, "component": "block_output", "low_rank_dimension": RANK,
              "intervention": intervention(**options)} for n in layers]  # fmt: skip
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=parts))
    where = [
        get_intervention_locations(
            last_position=n, positions=POSITIONS, num_interventions=len(layers), share_weights=tied
        )
        for n in LENGTHS
    ]
    where = (torch.tensor(where).permute(1, 0, 2) + 1).tolist()  # (interventions, batch, positions)
    places = {"sources->base": (None, where)}
    _, out = reft({"input_ids": ids, "attention_mask": mask}, unit_locations=places)
    (out.logits.square() * mask[..., None]).sum().backward()
    found = {"logits": out.logits.detach()}
    for i, part in enumerate(parts):
        own = part["intervention"]
        rotation = own.rotate_layer.weight.T if "rotate_layer" in own._modules else own.proj_layer.weight
        learned = own.learned_source
        parts = {"b": learned} if isinstance(learned, torch.nn.Parameter) else {"W": learned.weight, "b": learned.bias}
        found |= {f"{i}.R": rotation.detach()}
        found |= {f"{i}.{name}": t.detach() for name, t in parts.items()}
        found |= {f"{i}.{name}.grad": t.grad for name, t in parts.items()}
    row = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    places = {"sources->base": (None, [[rows[0]] for rows in where])}
    _, tokens = reft.generate(row, unit_locations=places, intervene_on_prompt=True, max_new_tokens=8, do_sample=False,
                              eos_token_id=None, pad_token_id=0)  # fmt: skip
    return {k: t.clone().contiguous() for k, t in (found | {"tokens": tokens}).items()}


if __name__ == "__main__":
    main()
