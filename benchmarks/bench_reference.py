"""The reference backend on a processor: scores and compression of one layer against a materialised attention matrix.

Time is the median of several runs. Peak memory is how far the resident set of a fresh process grows: unlike a count of
tensors it includes what the matrix library and the allocator take (read from /proc: Linux only).
LOOKM_BENCH_SIZE=small is a quick run without targets; LOOKM_BENCH_RESULTS=FOLDER writes reference.json there.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from targets import CPU_TARGETS
from torch import Tensor

import lookm_kernels

RESULTS = os.environ.get("LOOKM_BENCH_RESULTS")
SIZE = os.environ.get("LOOKM_BENCH_SIZE", "full")
HEADS, TOKENS, WIDTH = {"full": (32, 4096, 128), "small": (4, 512, 64)}[SIZE]
KEEP = TOKENS // 5
ROUNDS = 5


class Layer(NamedTuple):
    """A prompt of one row: [1, H, N, D] each, and the selection classes [1, N]."""

    query: Tensor
    key: Tensor
    value: Tensor
    tier: Tensor


def random_layer(heads: int = HEADS, tokens: int = TOKENS, width: int = WIDTH) -> Layer:
    """Two in a hundred tokens are text, the last tenth is protected."""
    query, key, value = torch.randn(3, 1, heads, tokens, width).unbind()
    tier = 1 + (torch.rand(1, tokens) < 0.02).int()
    tier[:, tokens - tokens // 10 :] = 3
    return Layer(query, key, value, tier)


def blocked_scores(query: Tensor, key: Tensor) -> Tensor:
    """lookm-kernels: blocks of queries."""
    return lookm_kernels.attention_scores(query, key)


def blocked_compress(key: Tensor, value: Tensor, scores: Tensor, tier: Tensor) -> Tensor:
    """lookm-kernels: selection, pivotal merge and compaction in place."""
    return lookm_kernels.compress_(key, value, scores, tier, KEEP, rule="pivotal")


def materialised_scores(query: Tensor, key: Tensor) -> Tensor:
    """s_j = sum over i of softmax_j(q_i . k_j / sqrt(D)), with the whole matrix in memory."""
    tokens = key.shape[2]
    logits = (query * query.shape[-1] ** -0.5) @ key.mT
    logits.masked_fill_(torch.ones(tokens, tokens, dtype=torch.bool).triu_(1), float("-inf"))
    return logits.softmax(-1).sum(2)


def materialised_compress(key: Tensor, value: Tensor, scores: Tensor, tier: Tensor) -> Tensor:
    """The highest score added once a class, the cosines of all pairs, x_c <- (x_c + sum (x_e + x_c) / 2) / (1 + n)."""
    # in float64, or the sum would round close scores to ties
    ranking = scores.double() + tier[:, None] * scores.amax(-1, keepdim=True)
    kept = ranking.topk(KEEP).indices.sort().values
    leaves = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, kept, False)
    evicted = leaves.nonzero()[:, 2].view(*scores.shape[:2], -1)
    unit = key / key.norm(dim=-1, keepdim=True)
    cosine = unit.take_along_dim(evicted[..., None], 2) @ unit.take_along_dim(kept[..., None], 2).mT
    pivot = cosine.argmax(-1)
    count = torch.zeros(kept.shape).scatter_add_(-1, pivot, torch.ones(pivot.shape))[..., None]
    for x in (key, value):
        stays, moving = x.take_along_dim(kept[..., None], 2), x.take_along_dim(evicted[..., None], 2)
        moving = (moving + stays.take_along_dim(pivot[..., None], 2)) / 2
        total = stays.scatter_add(2, pivot[..., None].expand_as(moving), moving)
        x[:, :, :KEEP] = total / (1 + count)
    return kept


APPROACHES = {
    "blocked": (blocked_scores, blocked_compress),
    "materialised": (materialised_scores, materialised_compress),
}


def run(approach: str, layer: Layer) -> None:
    """Scores, then compression in place."""
    scores, compress = APPROACHES[approach]
    compress(layer.key, layer.value, scores(layer.query, layer.key), layer.tier)


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def resident(entry: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[entry].split()[0]) * 1024


def peak_growth(approach: str) -> int:
    """Bytes that one run adds at its peak to the inputs and to what torch itself needs."""
    run(approach, random_layer(1, 2 * KEEP, 16))
    layer = random_layer()
    before = resident("VmRSS")
    run(approach, layer)
    return resident("VmHWM") - before


def peak_growth_of_a_fresh_process(approach: str) -> int:
    return int(subprocess.run([sys.executable, __file__, approach], check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    """Filled by the timings, read by the targets."""
    return {}


def test_both_compute_the_same() -> None:
    query, key, value, tier = random_layer()
    scores = blocked_scores(query, key)
    torch.testing.assert_close(scores, materialised_scores(query, key), rtol=1e-4, atol=1e-4)
    other = key.clone(), value.clone()
    kept = blocked_compress(key, value, scores, tier)
    assert torch.equal(kept.long(), materialised_compress(*other, scores, tier))
    for ours, theirs in zip((key, value), other, strict=True):
        rows = torch.isclose(ours[:, :, :KEEP], theirs[:, :, :KEEP], rtol=1e-4, atol=1e-4).all(-1)
        # of 100,000 tokens a few may have two pivots so close that rounding decides
        assert rows.float().mean() >= 0.999


@pytest.mark.parametrize("approach", APPROACHES)
def test_compress(benchmark: BenchmarkFixture, measured: dict[str, dict[str, float]], approach: str) -> None:
    layer = random_layer()
    original = layer.key.clone(), layer.value.clone()

    def restored() -> tuple[tuple[str, Layer], dict[str, Any]]:
        layer.key.copy_(original[0])
        layer.value.copy_(original[1])
        return (approach, layer), {}

    benchmark.extra_info["flops"] = 2 * HEADS * WIDTH * (TOKENS * TOKENS + KEEP * (TOKENS - KEEP))
    benchmark.extra_info["bytes"] = sum(x.nbytes for x in layer) + 2 * HEADS * KEEP * WIDTH * 4
    benchmark.extra_info["peak_bytes"] = peak_growth_of_a_fresh_process(approach)
    benchmark.pedantic(run, setup=restored, rounds=ROUNDS, warmup_rounds=1)
    measured[approach] = {"median_s": benchmark.stats.stats.median, "peak_bytes": benchmark.extra_info["peak_bytes"]}


def test_targets(measured: dict[str, dict[str, float]]) -> None:
    """An eighth of the memory, and no more time."""
    if SIZE != "full":
        pytest.skip("the targets are for the full size")
    ours, theirs = measured["blocked"], measured["materialised"]
    record = {
        "shape": {"batch": 1, "heads": HEADS, "tokens": TOKENS, "width": WIDTH, "keep": KEEP, "dtype": "float32"},
        "versions": {
            "lookm_kernels": lookm_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "rounds": ROUNDS,
        "attention_matrix_bytes": HEADS * TOKENS * TOKENS * 4,
        "results": measured,
        "time_ratio": ours["median_s"] / theirs["median_s"],
        "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
    }
    if RESULTS is not None:
        Path(RESULTS, "reference.json").write_text(json.dumps(record, indent=2) + "\n")
    for name, target in CPU_TARGETS.items():
        if target.benchmark == "reference":
            assert target.met(record[name]), target.text


if __name__ == "__main__":
    print(peak_growth(sys.argv[1]))
