"""SnapKV of kvpress beside DynamicCache: PYTHON benchmarks/peer_snapkv.py CONFIG.json BATCH TOKENS STEPS DTYPE

For the python of an environment of its own: kvpress wants an older transformers than this package, so that neither can
be imported beside the other. The caches read the same random prompt and decode one token in turn, as lookm.bench has
it; prints JSON: versions, and seconds by cache.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import SnapKVPress
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

WARM_STEPS = 4
PREFILLS = 2


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Run:
    """One cache; keep: share of the pairs that stays, None for all."""

    def __init__(self, model: Any, keep: float | None) -> None:
        self.model, self.press = model, None if keep is None else SnapKVPress(compression_ratio=1 - keep)
        self.prefills: list[float] = []
        self.steps: list[float] = []

    def forward(self, ids: torch.Tensor, begin: int) -> float:
        start = now()
        positions = torch.arange(begin, begin + ids.shape[1], device=ids.device).expand(ids.shape)
        found = self.model(input_ids=ids, position_ids=positions, past_key_values=self.cache, logits_to_keep=1)
        found.logits[:, -1].float().argmax(-1)
        return now() - start

    def read(self, ids: torch.Tensor) -> None:
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        with nullcontext() if self.press is None else self.press(self.model):
            self.prefills.append(self.forward(ids, 0))
        self.cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


@torch.no_grad()
def main(file: str, batch: int, tokens: int, steps: int, dtype: str) -> None:
    fields = json.loads(Path(file).read_text())
    fields.pop("source")
    config = AutoConfig.for_model(**fields)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = kind.from_config(config, dtype=getattr(torch, dtype)).eval()
    vocabulary = config.get_text_config().vocab_size
    # no placeholder: those of the shapes in configs/ are the last ids but a few
    ids = torch.randint(vocabulary // 2, (batch, tokens + WARM_STEPS + steps), device=device)
    runs = {"DynamicCache": Run(model, None)}
    runs |= {f"kvpress SnapKV {100 * keep:g} %": Run(model, keep) for keep in (0.2, 0.05)}
    for _ in range(PREFILLS):
        for run in runs.values():
            run.read(ids[:, :tokens])
    for index in range(WARM_STEPS + steps):
        for run in runs.values():
            run.steps.append(run.forward(ids[:, tokens + index, None], tokens + index))
    rows = {
        name: {"prefills": run.prefills, "steps": run.steps[WARM_STEPS:], "cache_bytes": run.cache_bytes}
        for name, run in runs.items()
    }
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    print(json.dumps({"versions": versions, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
