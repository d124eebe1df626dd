"""select_tokens, a fifth of every row, beside torch.topk with a sort of its indices, and a sort of the whole row.

The peers know no tiers and return no evicted tokens: they do less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timing
import torch
import work
from pytest_benchmark.fixture import BenchmarkFixture
from targets import OURS
from timing import CUDA
from torch import Tensor

import lookm_kernels

# batch, KV heads, tokens
SHAPES = [(batch, heads, tokens << 10) for tokens in (4, 32, 128) for batch, heads in ((1, 8), (4, 8), (8, 32))]
SMALL_SHAPES = [(1, 2, 300), (2, 4, 500)]
TARGET = SMALL_SHAPES[0] if timing.SMALL else (4, 8, 32 << 10)
WHAT = "select"
TOPK, SORT = "torch.topk + sort", "torch.sort"
VARIANTS: dict[str, Callable[[Tensor, Tensor, int], Any]] = {
    OURS: lookm_kernels.select_tokens,
    CUDA: timing.in_cuda(lookm_kernels.select_tokens),
    TOPK: lambda scores, tier, keep: scores.topk(keep, sorted=False).indices.sort().values,
    SORT: lambda scores, tier, keep: scores.sort(descending=True).indices[..., :keep],
}


def random_scores(batch: int, heads: int, tokens: int) -> Tensor:
    """A random order of distinct scores in every row."""
    return torch.rand(batch, heads, tokens, device=timing.DEVICE).argsort().float()


def random_tiers(batch: int, tokens: int) -> Tensor:
    """[B, N] int32: two in a hundred tokens are text, the last tenth is protected."""
    tier = 1 + (torch.rand(batch, tokens, device=timing.DEVICE) < 0.02).int()
    tier[:, tokens - tokens // 10 :] = 3
    return tier


def sizes(shape: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("batch", "heads", "tokens"), shape, strict=True))


def check(by: str) -> None:
    """Ours against the reference; the peers against ours where all tokens are images."""
    scores, tier = random_scores(3, 2, 1000), random_tiers(3, 1000)
    if by in (OURS, CUDA):
        kept, evicted = VARIANTS[by](scores, tier, 200)
        with lookm_kernels.use_backend("reference"):
            expected = lookm_kernels.select_tokens(scores, tier, 200)
        assert torch.equal(kept, expected[0])
        assert torch.equal(evicted, expected[1])
        return
    images = torch.ones_like(tier)
    ours = lookm_kernels.select_tokens(scores, images, 200)[0]
    assert torch.equal(VARIANTS[by](scores, images, 200).sort().values.int(), ours)


@pytest.mark.parametrize("by", VARIANTS)
@pytest.mark.parametrize("shape", SMALL_SHAPES if timing.SMALL else SHAPES, ids=str)
@pytest.mark.benchmark(timer=timing.device_clock)
def test_select(benchmark: BenchmarkFixture, record: timing.Record, shape: tuple[int, int, int], by: str) -> None:
    reason = timing.why_no_cuda(by)
    if reason is not None:
        record.missing(WHAT, by, sizes(shape), reason)
        pytest.skip(reason)
    check(by)
    batch, heads, tokens = shape
    keep = tokens // 5
    held = batch * heads * tokens * work.FLOAT32
    inputs = [(random_scores(*shape), random_tiers(batch, tokens)) for _ in range(timing.input_sets(held))]
    calls = [lambda given=given: VARIANTS[by](*given, keep) for given in inputs]
    measured = timing.measure(benchmark, calls)
    record.add(benchmark, WHAT, by, sizes(shape), work.select(*shape), measured)


def test_targets(record: timing.Record) -> None:
    ours, cuda, peer = (record.value(WHAT, by, sizes(TARGET)) for by in (OURS, CUDA, TOPK))
    record.target("select_time", timing.ratio(ours, 1e-6))
    record.target("select_topk", timing.ratio(peer, ours))
    record.target("select_cuda", timing.ratio(ours, cuda))
    record.check_targets(*([] if timing.why_no_cuda(CUDA) is None else ["select_cuda"]))
