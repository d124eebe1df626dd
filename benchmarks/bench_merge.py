"""nearest_kept, merge_ and compact_ at a budget of a fifth, beside the same in plain torch.

Besides random keys ("even") there is the case of one kept token that attracts every evicted one ("hub"), the parts
alone at the target's shape, and what each needs in memory at its peak.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import timing
import torch
import work
from pytest_benchmark.fixture import BenchmarkFixture
from targets import OURS
from timing import CUDA
from torch import Tensor

import lookm_kernels

WIDTH = 32 if timing.SMALL else 128
# batch, heads, tokens
SHAPES = [(1, heads, tokens << 10) for heads in (8, 32) for tokens in (4, 16, 32, 128)] + [(8, 8, 32 << 10)]
SMALL_SHAPES = [(1, 2, 300), (2, 4, 200)]
TARGET = SMALL_SHAPES[0] if timing.SMALL else (1, 8, 32 << 10)
TORCH = "plain torch"
EVEN, HUB = "nearest + merge + compact", "nearest + merge + compact, one hub"
# elements of one block of cosines in plain torch
BLOCK = 1 << 28


class Layer(NamedTuple):
    """key and value [B, H, N, D]; kept [B, H, K] and evicted [B, H, E] int32."""

    key: Tensor
    value: Tensor
    kept: Tensor
    evicted: Tensor


def random_layer(batch: int, heads: int, tokens: int, hub: bool = False) -> Layer:
    """With a hub, evicted keys point its way and the other kept ones away from it."""
    key, value = torch.randn(2, batch, heads, tokens, WIDTH, device=timing.DEVICE, dtype=timing.DTYPE).unbind()
    scores = torch.rand(batch, heads, tokens, device=timing.DEVICE)
    tier = torch.ones(batch, tokens, dtype=torch.int32, device=timing.DEVICE)
    kept, evicted = lookm_kernels.select_tokens(scores, tier, tokens // 5)
    if hub:
        direction = torch.randn(WIDTH, device=timing.DEVICE, dtype=timing.DTYPE)
        away = kept[..., [i for i in range(kept.shape[-1]) if i != kept.shape[-1] // 2]]
        sign = torch.ones(key.shape[:3], device=timing.DEVICE, dtype=timing.DTYPE).scatter_(-1, away.long(), -1)
        key = key * 0.1 + sign[..., None] * direction
    return Layer(key, value, kept, evicted)


def merged(layer: Layer) -> Tensor:
    """Pivotal merge with the ops of this package; returns the pivots."""
    key, value, kept, evicted = layer
    pivot, similarity = lookm_kernels.nearest_kept(key, kept, evicted)
    weights = lookm_kernels.merge_weights("pivotal", similarity, pivot, kept)
    lookm_kernels.merge_(key, value, kept, evicted, pivot, *weights)
    lookm_kernels.compact_(key, value, kept)
    return pivot


def merged_in_torch(layer: Layer) -> Tensor:
    """The same with gather, a matrix of cosines a block of evicted tokens at a time, and scatter_add."""
    key, value, kept, evicted = layer
    stays, leaves = kept.long(), evicted.long()
    unit = key / key.norm(dim=-1, keepdim=True)
    columns = unit.take_along_dim(stays[..., None], 2).mT
    rows = max(1, BLOCK // stays.numel())
    blocks = [(unit.take_along_dim(part[..., None], 2) @ columns).argmax(-1) for part in leaves.split(rows, -1)]
    pivot = torch.cat(blocks, -1)
    count = torch.zeros(kept.shape, device=key.device).scatter_add_(
        -1, pivot, torch.ones(pivot.shape, device=key.device)
    )
    for tensor in (key, value):
        own = tensor.take_along_dim(stays[..., None], 2).float()
        moving = (tensor.take_along_dim(leaves[..., None], 2) + own.take_along_dim(pivot[..., None], 2)) / 2
        own.scatter_add_(2, pivot[..., None].expand_as(moving), moving)
        tensor[:, :, : kept.shape[-1]] = (own / (1 + count[..., None])).to(tensor.dtype)
    return pivot.int()


APPROACHES: dict[str, Callable[[Layer], Tensor]] = {
    OURS: merged,
    CUDA: timing.in_cuda(merged),
    TORCH: merged_in_torch,
}


def copied(layer: Layer) -> Layer:
    return Layer(layer.key.clone(), layer.value.clone(), layer.kept, layer.evicted)


def check(by: str, hub: bool) -> None:
    """Pivots as good as the reference's, and the rows that these pivots give."""
    layer = random_layer(2, 3, 400, hub)
    ours = copied(layer)
    pivot = APPROACHES[by](ours)
    exact = Layer(layer.key.float(), layer.value.float(), layer.kept, layer.evicted)
    unit = exact.key / exact.key.norm(dim=-1, keepdim=True)
    left, right = (unit.take_along_dim(x.long()[..., None], 2) for x in (layer.evicted, layer.kept))
    cosine = left @ right.mT
    found = cosine.take_along_dim(pivot.long()[..., None], -1)[..., 0]
    assert float((cosine.amax(-1) - found).max()) < 1e-2
    assert not hub or bool((pivot == layer.kept.shape[-1] // 2).all())
    with lookm_kernels.use_backend("reference"):
        weights = lookm_kernels.merge_weights("pivotal", found, pivot, layer.kept)
        lookm_kernels.merge_(*exact, pivot, *weights)
        lookm_kernels.compact_(exact.key, exact.value, exact.kept)
    keep = layer.kept.shape[-1]
    for result, expected in ((ours.key, exact.key), (ours.value, exact.value)):
        assert timing.relative_error(result[:, :, :keep], expected[:, :, :keep]) < 1e-2


def sizes(shape: tuple[int, int, int]) -> dict[str, int]:
    batch, heads, tokens = shape
    return {"batch": batch, "heads": heads, "tokens": tokens, "keep": tokens // 5, "width": WIDTH}


def layers(shape: tuple[int, int, int], hub: bool = False) -> tuple[list[Layer], list[Layer]]:
    """Layers to time, as many as outgrow the cache, and a copy of each to restore it from."""
    first = random_layer(*shape, hub)
    more = timing.input_sets(first.key.nbytes + first.value.nbytes) - 1
    originals = [first, *(random_layer(*shape, hub) for _ in range(more))]
    return originals, [copied(layer) for layer in originals]


def restored(originals: list[Layer], used: list[Layer]) -> Callable[[], None]:
    def restore() -> None:
        for original, layer in zip(originals, used, strict=True):
            layer.key.copy_(original.key)
            layer.value.copy_(original.value)

    return restore


@pytest.mark.parametrize("by", APPROACHES)
@pytest.mark.parametrize("what", [EVEN, HUB])
@pytest.mark.parametrize("shape", SMALL_SHAPES if timing.SMALL else SHAPES, ids=str)
@pytest.mark.benchmark(timer=timing.device_clock)
def test_merge(
    benchmark: BenchmarkFixture, record: timing.Record, shape: tuple[int, int, int], what: str, by: str
) -> None:
    reason = timing.why_no_cuda(by)
    if reason is not None:
        record.missing(what, by, sizes(shape), reason)
        pytest.skip(reason)
    hub = what == HUB
    check(by, hub)
    originals, used = layers(shape, hub)
    run = APPROACHES[by]
    run(used[0])
    extra = timing.peak_extra_bytes(lambda: run(used[0]))
    measured = timing.measure(benchmark, [lambda layer=layer: run(layer) for layer in used], restored(originals, used))
    held = used[0].key.nbytes + used[0].value.nbytes
    share = None if extra is None else extra / held
    work_done = work.merging(**sizes(shape))
    record.add(benchmark, what, by, sizes(shape), work_done, measured, peak_extra_bytes=extra, peak_extra_share=share)


def parts(layer: Layer) -> dict[str, tuple[work.Work, Callable[[], object]]]:
    """Each op alone, with what the ones before it gave."""
    key, value, kept, evicted = layer
    pivot, similarity = lookm_kernels.nearest_kept(key, kept, evicted)
    weights = lookm_kernels.merge_weights("pivotal", similarity, pivot, kept)
    batch, heads, tokens, width = key.shape
    size = (batch, heads, tokens, kept.shape[-1], width)
    return {
        "nearest": (work.nearest(*size), lambda: lookm_kernels.nearest_kept(key, kept, evicted)),
        "weights": (
            work.Work(0, 6 * pivot.nbytes),
            lambda: lookm_kernels.merge_weights("pivotal", similarity, pivot, kept),
        ),
        "merge": (work.merge(*size), lambda: lookm_kernels.merge_(key, value, kept, evicted, pivot, *weights)),
        "compact": (work.compact(*size), lambda: lookm_kernels.compact_(key, value, kept)),
    }


PARTS = [*((part, OURS) for part in ("nearest", "weights", "merge", "compact")), ("merge", CUDA), ("compact", CUDA)]


@pytest.mark.parametrize(("part", "by"), PARTS)
@pytest.mark.benchmark(timer=timing.device_clock)
def test_part(benchmark: BenchmarkFixture, record: timing.Record, part: str, by: str) -> None:
    reason = timing.why_no_cuda(by)
    if reason is not None:
        record.missing(part, by, sizes(TARGET), reason)
        pytest.skip(reason)
    originals, used = layers(TARGET)
    each = [parts(layer)[part] for layer in used]
    calls = [timing.in_cuda(call) if by == CUDA else call for _, call in each]
    measured = timing.measure(benchmark, calls, restored(originals, used))
    record.add(benchmark, part, by, sizes(TARGET), each[0][0], measured)


def test_targets(record: timing.Record) -> None:
    shape = sizes(TARGET)
    even, hub = (record.value(what, OURS, shape) for what in (EVEN, HUB))
    record.target("merge_time", timing.ratio(even, 1e-3))
    record.target("merge_memory", timing.ratio(record.value(EVEN, OURS, shape, "peak_extra_share"), 0.01))
    record.target("merge_hub", timing.ratio(hub, even))
    for part in ("merge", "compact"):
        record.target(f"{part}_cuda", timing.ratio(*(record.value(part, by, shape) for by in (OURS, CUDA))))
    excused = [] if timing.ON_GPU else ["merge_memory"]
    record.check_targets(*excused, *([] if timing.why_no_cuda(CUDA) is None else ["merge_cuda", "compact_cuda"]))
