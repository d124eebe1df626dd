"""What cheaper scoring costs in quality: python benchmarks/quality/scoring.py [OUT.json]

On the shipped demo model and the prompts of `lookm demo --seed 7`, with policy lookm: exact match of the answers in
later turns, and how many of the tokens that the attention of all queries keeps are kept.
"""

from __future__ import annotations

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lookm import LookMCache, Prompt
from lookm.demo.checkpoint import load
from lookm.demo.dialogue import converse, exact_matches, script
from lookm.demo.task import LAYOUTS, draw_prompts, held_out_scans
from lookm.policy import resolve_policy

OUT = Path(__file__).parent.parent / "results" / "cpu" / "scoring.json"
SEED, BUDGETS, DIALOGUES, IMAGES, FRAMES = 7, (0.2, 0.1), 16, 8, 3
# the first is what the others are compared with
SCORINGS: dict[str, dict[str, Any]] = {
    "all queries": {},
    "text queries": {"queries": "text"},
    **{f"sampled, stride {stride}": {"queries": "sampled", "stride": stride} for stride in (4, 8, 16)},
    "all queries, fp8": {"fp8": True},
    "sampled, stride 8, fp8": {"queries": "sampled", "stride": 8, "fp8": True},
}


def measure(model: Any, budget: float, options: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """Exact match and scored queries in percent, and the kept tokens [B, H, K] of every layout and layer."""
    generator = torch.Generator().manual_seed(SEED)
    matches, kept, scored = {}, [], []
    for layout in LAYOUTS:
        prompt = draw_prompts(DIALOGUES, IMAGES, layout, FRAMES, held_out_scans(), generator)
        turns = script(prompt, generator)
        cache = LookMCache(model, budget, "lookm", **options)
        dialogue = converse(model, prompt, turns, cache)
        answers = exact_matches(turns, dialogue.said)[1:]
        matches[f"exact_match_{layout}"] = 100 * answers.float().mean().item()
        kept += [layer.kept for layer in cache.layers]
        image = cache.layers[0].image[:, : cache.layers[0].compressed_at]
        weight = resolve_policy("lookm", options).query_weight(Prompt(image, None, [], [], []))
        scored.append(1.0 if weight is None else (weight > 0).float().mean().item())
    mean = sum(matches.values()) / len(matches)
    counts = {"answers": answers.numel() * len(LAYOUTS), "queries": 100 * sum(scored) / len(scored)}
    return {"exact_match": mean, **matches, **counts}, kept


def overlap(kept: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Share of the exactly kept tokens that are kept, in percent: of all, and of those that are not the recent ones."""
    common = sum(int((ours[..., None] == theirs[..., None, :]).sum()) for ours, theirs in zip(kept, exact, strict=True))
    total = sum(theirs.numel() for theirs in exact)
    recent = sum(math.floor(theirs.shape[2] / 2) * theirs[..., 0].numel() for theirs in exact)
    return {"overlap": 100 * common / total, "overlap_important": 100 * (common - recent) / (total - recent)}


def main(out: Path) -> None:
    """Write the result file."""
    torch.set_num_threads(1)
    model, _ = load()
    cells = []
    for budget in BUDGETS:
        for name, options in SCORINGS.items():
            cell, kept = measure(model, budget, options)
            if not options:
                exact = kept
            cells.append({"scoring": name, "budget": budget, **cell, **overlap(kept, exact)})
            print(cells[-1], flush=True)
    versions = {package: version(package) for package in ("lookm-kernels", "torch", "transformers")}
    out.write_text(json.dumps({"seed": SEED, "versions": versions, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
