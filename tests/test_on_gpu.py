"""What only a GPU can show: nothing waits for it, the ops can be captured in a graph, and little memory is added."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from inputs import random, same_bits, tiers
from torch import Tensor

from lookm_kernels import attention_scores, compress_, kept_attention, use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]

BATCH, HEADS, TOKENS, WIDTH = 2, 4, 2048, 128
KEEP = [500, 300]
Layer = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def layer() -> Layer:
    """Query, key, value and selection classes of a padded batch."""
    query, key, value = (
        random(seed, BATCH, heads, TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda")
        for seed, heads in enumerate((2 * HEADS, HEADS, HEADS))
    )
    return query, key, value, tiers(0, BATCH, TOKENS, "cuda")


def score_and_compress(query: Tensor, key: Tensor, value: Tensor, tier: Tensor, rule: str = "pivotal") -> Tensor:
    """What a layer does right after its attention; key and value are modified."""
    start = (tier == 0).sum(1, dtype=torch.int32)
    scores = attention_scores(query, key, key_start=start)
    return compress_(key, value, scores, tier, KEEP, rule, "mean_similarity")


@pytest.fixture
def waiting_is_an_error() -> Iterator[Callable[[], None]]:
    """Call it when everything is warm: from then on an operation that waits for the GPU raises RuntimeError."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", ["none", "average", "pivotal", "weighted"])
def test_nothing_waits_for_the_device(layer: Layer, waiting_is_an_error: Callable[[], None], rule: str) -> None:
    query, key, value, tier = layer
    goal = [key.clone(), value.clone()]
    kept = score_and_compress(query, *goal, tier, rule)
    waiting_is_an_error()
    found = score_and_compress(query, key, value, tier, rule)
    torch.cuda.set_sync_debug_mode("default")
    assert same_bits(found, kept)
    assert same_bits(key[:, :, : max(KEEP)], goal[0][:, :, : max(KEEP)])
    assert same_bits(value[:, :, : max(KEEP)], goal[1][:, :, : max(KEEP)])


def test_a_graph_replays_to_the_same_bits(layer: Layer) -> None:
    query, key, value, tier = layer
    goal = [key.clone(), value.clone()]
    kept = score_and_compress(query, *goal, tier)
    work = [key.clone(), value.clone()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = score_and_compress(query, *work, tier)
    for _ in range(3):
        work[0].copy_(key)
        work[1].copy_(value)
        graph.replay()
        assert same_bits(captured, kept)
        assert same_bits(work[0][:, :, : max(KEEP)], goal[0][:, :, : max(KEEP)])
        assert same_bits(work[1][:, :, : max(KEEP)], goal[1][:, :, : max(KEEP)])


def test_attention_over_kept_pairs_replays_to_the_same_bits(
    layer: Layer, waiting_is_an_error: Callable[[], None]
) -> None:
    """A decode step in a graph: nothing waits, new keys in the same memory are read, and as many as there are then."""
    query, key, value, tier = layer
    start, bias = (tier == 0).sum(1, dtype=torch.int32), random(3, BATCH, HEADS, TOKENS, device="cuda")
    end = torch.full_like(start, TOKENS - 9)
    step, cached = query[:, :, -1:].clone(), key.clone()
    kept_attention(step, cached, value, key_bias=bias, key_start=start, key_end=end)
    waiting_is_an_error()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kept_attention(step, cached, value, key_bias=bias, key_start=start, key_end=end)
    torch.cuda.set_sync_debug_mode("default")
    for shift in (0, 5):
        cached.copy_(key.roll(shift, 1))
        end.add_(shift)
        graph.replay()
        assert same_bits(captured, kept_attention(step, cached, value, key_bias=bias, key_start=start, key_end=end))


def test_extra_memory_is_at_most_a_tenth_of_the_cache() -> None:
    """With what torch's sort needs inside."""
    key, value = (random(seed, 1, 8, 32768, WIDTH, dtype=torch.bfloat16, device="cuda") for seed in (0, 1))
    scores, tier = random(2, 1, 8, 32768, device="cuda"), tiers(0, 1, 32768, "cuda")
    compress_(key.clone(), value.clone(), scores, tier, 6553)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compress_(key, value, scores, tier, 6553)
    assert torch.cuda.max_memory_allocated() - before <= (key.nbytes + value.nbytes) / 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_tile_of_this_chip_agrees_with_the_reference(dtype: torch.dtype) -> None:
    """At sizes that fill many blocks, for every head size that has a tile of its own."""
    for width in (64, 80, 128, 256, 512):
        query, key = (random(width + heads, 1, heads, 700, width, dtype=dtype, device="cuda") for heads in (4, 2))
        with use_backend("reference"):
            exact = attention_scores(query.double(), key.double())
            reference = attention_scores(query, key).double()
        error = (attention_scores(query, key).double() - exact).abs().max()
        assert error <= 2 * (reference - exact).abs().max() + 1e-5 * exact.max()
