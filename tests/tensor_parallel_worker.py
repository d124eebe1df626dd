"""What test_tensor_parallel.py runs under torchrun: one family's model, its heads split over the processes.

Arguments: the family, the folder of its checkpoint, a JSON file of cases (arguments of LookMCache by name), and a
folder for what each process found.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from families import FAMILIES, IMAGE, Family
from transformers import DynamicCache, PreTrainedModel

from lookm import LookMCache
from lookm.modality import cache_keyword
from lookm.parallel import leave, shared_seed, split_arguments

NEW_TOKENS = 12


def generate(family: Family, model: PreTrainedModel, case: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of two rows, one of them padded on the left, and what the cache holds.

    {"tokens": [row][token], "heads": [layer], "kept": [layer][row][head][place]}; kept is empty for an ordinary cache,
    which the case {} asks for. {"refused": why} for a cache that is refused.
    """
    prompts = [family.prompt((20, IMAGE, 9, IMAGE, 4), seed=1), family.prompt((4, IMAGE, 7), seed=2)]
    inputs = {name: tensor.to(model.device) for name, tensor in family.inputs(prompts).items()}
    try:
        cache = LookMCache(model, **case) if case else DynamicCache(config=model.config)
    except NotImplementedError as error:
        return {"refused": str(error)}
    sequences = model.generate(
        **inputs, **{cache_keyword(model): cache}, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )
    return {
        "tokens": sequences[:, inputs["input_ids"].shape[1] :].tolist(),
        "heads": [layer.keys.shape[1] for layer in cache.layers],
        "kept": [cache.kept_positions(layer).tolist() for layer in range(len(cache.layers))] if case else [],
    }


def main(name: str, checkpoint: str, cases: str, out: str) -> None:
    """Writes OUT/RANK.json: what `generate` finds in each case, and a seed."""
    torch.set_num_threads(1)
    family = FAMILIES[name]
    model = getattr(transformers, family.model_class).from_pretrained(checkpoint, **split_arguments()).eval()
    found = {case: generate(family, model, given) for case, given in json.loads(Path(cases).read_text()).items()}
    found["seed"] = shared_seed(None)
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
