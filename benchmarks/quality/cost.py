"""What votes and each way to merge cost on a CPU: python benchmarks/quality/cost.py [OUT.json]

One layer of 32 query and 8 KV heads x 4096 tokens x 128 (float32) compressed to 20 % as the policy lookm does, with one
thing more at a time, and a decode step over what stays; every figure is the median of interleaved runs, beside that of
the plain path.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lookm.coverage import floor_levels, with_levels
from lookm_kernels import compress_, kept_attention

OUT = Path(__file__).parent.parent / "results" / "cpu" / "votes.json"
HEADS, KV_HEADS, TOKENS, KEPT, WIDTH, RUNS = 32, 8, 4096, 819, 128, 5


def medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each call, all of them in turn, so that a busy moment meets all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(RUNS + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            if run:
                times[name].append((time.perf_counter() - begin) / repeats)
    return {name: statistics.median(own) for name, own in times.items()}


def compressions() -> dict[str, Callable[[], Any]]:
    """Every way to compress the layer."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, KV_HEADS, TOKENS, WIDTH, generator=generator) for _ in range(2))
    scores = torch.rand(1, KV_HEADS, TOKENS, generator=generator)
    tier = torch.ones(1, TOKENS, dtype=torch.int32)
    group = (torch.arange(TOKENS, dtype=torch.int32) // 1024)[None]
    outs = {name: key.new_empty(1, KV_HEADS, KEPT, WIDTH) for name in ("out_key", "out_value")}
    votes = {"out_votes": scores.new_empty(1, KV_HEADS, KEPT)}
    more: dict[str, dict[str, Any]] = {
        "plain": {},
        "votes": votes,
        "group": {"group": group},
        "min_similarity": {"min_similarity": 0.2},
        "similarity of keys and values": {"similarity": "key_value"},
        "refine=1": {"refine": 1},
        "all of these": votes | {"group": group, "min_similarity": 0.2, "similarity": "key_value", "refine": 1},
    }

    def run(options: dict[str, Any]) -> Callable[[], Any]:
        return lambda: compress_(key, value, scores, tier, KEPT, "pivotal", **outs, **options)

    def floor() -> Any:
        levelled = with_levels(scores, floor_levels(scores, group, 2))
        return compress_(key, value, levelled, tier, KEPT, "pivotal", **outs)

    return {name: run(options) for name, options in more.items()} | {"floor=2": floor}


def decode_steps() -> dict[str, Callable[[], Any]]:
    """One query over what stays."""
    query = torch.randn(1, HEADS, 1, WIDTH)
    key, value = (torch.randn(1, KV_HEADS, KEPT, WIDTH) for _ in range(2))
    bias = torch.rand(1, KV_HEADS, KEPT)
    attend = torch.nn.functional.scaled_dot_product_attention
    return {
        "plain": lambda: attend(query, key, value, enable_gqa=True),
        "votes": lambda: kept_attention(query, key, value, key_bias=bias),
    }


def main(out: Path) -> None:
    """Write the result file."""
    torch.set_num_threads(1)
    with torch.no_grad():
        found = {"compression": medians(compressions(), 1), "decode attention": medians(decode_steps(), 200)}
    versions = {package: version(package) for package in ("lookm-kernels", "torch")}
    out.write_text(json.dumps({"versions": versions, "seconds": found}, indent=1) + "\n")
    for what, times in found.items():
        for name, seconds in times.items():
            print(f"{what:18s} {name:32s} {1e3 * seconds:8.3f} ms  {seconds / times['plain']:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
