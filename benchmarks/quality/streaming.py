"""What a conversation longer than the budget costs: python benchmarks/quality/streaming.py

A real decoder reads the text bed's documents for the end 64 tokens at a time, as turns with generated="window": all
that is stored is compressed to the budget after each. Written to benchmarks/quality/results/streaming.json after every
cell.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from quality.beds.text import TEXT, TextBed, load_decoder, why_missing
from quality.measure import write
from quality.table import RESULTS, cells_of, interval
from tables import markdown
from transformers import DynamicCache

from lookm import LookMCache
from lookm.modality import cache_keyword

FILE = RESULTS / "streaming.json"
POLICIES = ("streaming", "h2o", "lookm", "auto")
BUDGETS = (240,)
TURN, TOKENS = 64, 1344


@torch.no_grad()
def added_nll(model: Any, ids: Tensor, cache: Any) -> tuple[float, int]:
    """Nats a token of the second half of ids [1, N], read in turns of 64; the most pairs a layer held after one."""
    losses, most = [], 0
    for begin in range(0, ids.shape[1], TURN):
        turn = ids[:, begin : begin + TURN + 1]
        logits = model(input_ids=turn[:, :TURN], **{cache_keyword(model): cache}).logits[0, : turn.shape[1] - 1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, turn[0, 1:], reduction="none"))
        most = max(most, *(layer.keys.shape[2] for layer in cache.layers))
    return float(torch.cat(losses)[ids.shape[1] // 2 :].mean()), most


def measure(bed: TextBed, file: Path = FILE) -> None:
    """The full cache and every policy at every budget, on every document."""
    model, tokenizer = load_decoder(bed.dtype)
    cells = cells_of(file)
    wanted: list[tuple[str, int | None]] = [("full", None)]
    wanted += [(policy, budget) for policy in POLICIES for budget in BUDGETS]
    for policy, budget in wanted:
        if any((cell["policy"], cell["budget"]) == (policy, budget) for cell in cells):
            continue
        units = []
        for unit in bed.units("final"):
            ids = tokenizer(bed.documents[unit]["text"], return_tensors="pt").input_ids[:, :TOKENS]
            cache: Any = DynamicCache(config=model.config)
            if budget is not None:
                cache = LookMCache(model, budget, policy, generated="window")
            nll, most = added_nll(model, ids, cache)
            units.append({"unit": unit, "kind": bed.documents[unit]["kind"], "nll": nll, "most": most})
        cells.append({"policy": policy, "budget": budget, "units": units})
        write(file, cells)
        print(policy, budget, flush=True)


def streamed() -> str:
    """A policy a row: nats a token that it adds to the full cache's, unit by unit."""
    found = cells_of(FILE)
    if not found:
        return ""
    full = {unit["unit"]: unit["nll"] for unit in found[0]["units"]}
    rows = []
    for policy in dict.fromkeys(cell["policy"] for cell in found[1:]):
        row = [f"`{policy}`"]
        for budget in BUDGETS:
            cell = next(cell for cell in found if (cell["policy"], cell["budget"]) == (policy, budget))
            mean, low, high = interval([unit["nll"] - full[unit["unit"]] for unit in cell["units"]])
            row.append(f"{mean:.3f} ({low:.3f}, {high:.3f})")
        rows.append(row)
    mean = sum(full.values()) / len(full)
    header = ["policy", *(f"{budget} tokens" for budget in BUDGETS)]
    return f"{len(full)} documents; the full cache has {mean:.3f} nats a token.\n\n{markdown(header, rows)}"


def main() -> None:
    torch.set_num_threads(1)
    missing = why_missing()
    if missing is not None:
        print(f"skipped: {missing}")
    else:
        measure(TEXT)


if __name__ == "__main__":
    main()
