"""csrc/ without a GPU: what its launchers decide on the host, what they say when CUDA fails, and kernels in any order.

The kernels run in tests/emulator; that they equal the reference is in the tests of the ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulator import SHARED_MEMORY, Emulator
from inputs import LAYOUTS, arguments, call, laid_out, new_outs, random, same_bits, tiers
from torch import Tensor

from lookm_kernels import _native, compact_, merge_, nearest_kept, select_tokens, use_backend
from lookm_kernels._dispatch import why_missing
from lookm_kernels.cuda import compact, merge, select

SEEDS = range(6)
OPS = ("select_tokens", "merge_", "compact_", "merge_.out", "compact_.out")
KIBI = 1024


@pytest.fixture
def csrc(emulator: Emulator) -> Iterator[Emulator]:
    """The emulated extension, as it was before when the test ends."""
    yield emulator
    emulator.configure()


def on_both(op: str, given: dict[str, Any]) -> list[list[Tensor]]:
    """What the op gives with csrc/ and with the reference."""
    results = []
    for backend in ("cuda", "reference"):
        with use_backend(backend):
            results.append(call(op, given))
    return results


def check_all_orders(csrc: Emulator, op: str, given: dict[str, Any], tolerance: float = 0.0) -> None:
    """As the reference to a tolerance, and the same bits whatever the order of threads and blocks."""
    results, goal = on_both(op, given)
    for ours, reference in zip(results, goal, strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance, equal_nan=True)
    for seed in SEEDS:
        csrc.configure(seed + 1)
        with use_backend("cuda"):
            assert all(same_bits(ours, first) for ours, first in zip(call(op, given), results, strict=True))


@pytest.mark.parametrize("shared_memory", [SHARED_MEMORY, 24 * KIBI], ids=["cached", "not cached"])
@pytest.mark.parametrize("tokens", [3, 2048, 5001])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.99])
def test_selection_in_any_order(csrc: Emulator, tokens: int, keep: float, shared_memory: int) -> None:
    csrc.configure(0, shared_memory)
    assert bool(csrc.module.select_cache_bytes(tokens, shared_memory)) == (shared_memory == SHARED_MEMORY)
    scores = random(tokens, 2, 1, tokens).mul(20).round()
    scores[..., ::7] = float("nan")
    given = {"scores": scores, "tier": tiers(1, 2, tokens), "keep": int(keep * tokens)}
    results, goal = on_both("select_tokens", given)
    for seed in SEEDS:
        csrc.configure(seed + 1, shared_memory)
        with use_backend("cuda"):
            results += call("select_tokens", given)
    for place, ours in enumerate(results):
        assert same_bits(ours, goal[place % 2])


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merging_in_any_order(csrc: Emulator, layout: str, dtype: torch.dtype, value_dtype: torch.dtype) -> None:
    """A hub of several tiles, one whole tile with ends on both sides, and short runs."""
    tokens, kept_size = 900, 40
    evicted_size = tokens - kept_size
    pivot = torch.arange(evicted_size, dtype=torch.int32) % kept_size
    pivot[100:600] = 7
    pivot[600:800] = 30
    order = torch.arange(tokens, dtype=torch.int32).expand(1, 2, -1)
    given = {
        "key": laid_out(random(0, 1, 2, tokens, 48, dtype=dtype), layout),
        "value": laid_out(random(1, 1, 2, tokens, 264, dtype=value_dtype), layout),
        "kept": order[..., :kept_size],
        "evicted": order[..., kept_size:],
        "pivot": pivot.roll(13).expand(1, 2, -1),
        "evicted_weight": random(2, 1, 2, evicted_size).abs() / 100,
        "kept_weight": random(3, 1, 2, kept_size),
        "votes": random(4, 1, 2, tokens).abs(),
        "out_votes": torch.full((1, 2, kept_size), float("nan")),
    }
    tolerance = max(1e-5, 2 * torch.finfo(dtype).eps, 2 * torch.finfo(value_dtype).eps)
    check_all_orders(csrc, "merge_", given, tolerance)
    check_all_orders(csrc, "merge_.out", given | new_outs(given, kept_size), tolerance)


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("empty", [0, 300, 700])
def test_compaction_in_any_order(csrc: Emulator, empty: int, layout: str, value_dtype: torch.dtype) -> None:
    """With moves to the right, to the left and of nothing, further than a step of a block."""
    tokens = 2600
    kept = torch.cat([torch.full((empty,), -1), torch.arange(0, 500), torch.arange(1300, tokens)]).int()
    given = {
        "key": laid_out(random(0, 1, 2, tokens, 72).half(), layout),
        "value": laid_out(random(1, 1, 2, tokens, 36, dtype=value_dtype), layout),
        "kept": kept.expand(1, 2, -1),
    }
    check_all_orders(csrc, "compact_", given)
    check_all_orders(csrc, "compact_.out", given | new_outs(given, len(kept)))


def test_a_row_fits_shared_memory_or_not(csrc: Emulator) -> None:
    """4.25 bytes a token: 32k tokens fit the 163 KiB of an A100, 48k the 227 KiB of an H100."""
    fits = csrc.module.select_cache_bytes
    assert fits(32768, 163 * KIBI) == 32768 * 17 // 4
    assert fits(48 * KIBI - 1000, 227 * KIBI) > 0
    assert fits(48 * KIBI, 227 * KIBI) == 0
    assert fits(32768, 99 * KIBI) == 0
    assert fits(1, 99 * KIBI) == 17


@pytest.mark.parametrize(
    ("sizes", "bits"),
    [
        ((1, 1, 1, 1), 1),
        ((1, 8, 6553, 26215), 16),
        ((2, 4, 1023, 5), 13),
        ((1, 1, 1024, 0), 11),
        ((1, 2**16, 2**15, 1), 32),
    ],
)
def test_how_merging_is_cut(csrc: Emulator, sizes: tuple[int, int, int, int], bits: int) -> None:
    batch, heads, kept, evicted = sizes
    plan = csrc.module.merge_plan(*sizes, 128, 80)
    rows = batch * heads
    assert plan["items"] == rows * evicted
    assert plan["tiles"] == evicted // 128
    assert plan["key_bits"] == bits
    needed = 4 * [4 * rows * evicted] + [4 * rows * (kept + 1), 4 * rows * plan["tiles"] * 208]
    offsets = plan["offsets"]
    assert all(offset % 256 == 0 for offset in offsets)
    assert offsets[0] == 0
    for begin, end, size in zip(offsets[:-1], offsets[1:], needed, strict=True):
        assert size <= end - begin < size + 256
    assert csrc.module.merge_workspace(*sizes, 128, 80) > offsets[-1]


def test_merging_needs_little_memory(csrc: Emulator) -> None:
    """At most a twentieth of the cache of a layer of 8 heads and 32k tokens, of which a fifth stay."""
    workspace = csrc.module.merge_workspace(1, 8, 6553, 32768 - 6553, 128, 128)
    assert 0 < workspace <= 2 * 8 * 32768 * 128 * 2 / 20


def test_more_kept_tokens_than_a_sort_key_can_number(csrc: Emulator) -> None:
    with pytest.raises(RuntimeError, match=r"merge's workspace \(B=65536 H=65536 K=1 E=1\): invalid argument"):
        csrc.module.merge_workspace(65536, 65536, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("rows", "widths", "slab"), [(8, (256, 256), 32), (64, (256, 256), 64), (1000, (256, 256), 128), (1, (2, 2), 32)]
)
def test_compaction_is_cut_to_fill_the_gpu(csrc: Emulator, rows: int, widths: tuple[int, int], slab: int) -> None:
    """An H200 has 132 multiprocessors."""
    assert csrc.module.compact_slab_bytes(rows, *widths, 132) == slab


@pytest.mark.parametrize(
    ("address", "strides", "width", "sizes", "dtype", "widest"),
    [
        (256, (8192, 4096, 64), 64, (2, 2, 64), torch.float16, 16),
        (264, (8192, 4096, 64), 64, (2, 2, 64), torch.float16, 8),
        (256, (8192, 4096, 66), 64, (2, 2, 64), torch.float16, 4),
        (256, (8192, 4096, 66), 64, (2, 2, 1), torch.float16, 16),
        (256, (8192, 4097, 64), 64, (2, 2, 64), torch.float16, 2),
        (256, (8193, 4096, 64), 64, (1, 2, 64), torch.float16, 16),
        (256, (8192, 4096, 80), 5, (2, 2, 64), torch.float32, 4),
        (258, (8192, 4096, 80), 80, (2, 2, 64), torch.float16, 2),
    ],
)
def test_the_widest_access(
    csrc: Emulator,
    address: int,
    strides: tuple[int, int, int],
    width: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    widest: int,
) -> None:
    """By the address, the strides that are used, and the width; a stride of a dimension of size 1 is not used."""
    assert csrc.module.access_bytes((address, strides, width, _native.DTYPES[dtype]), *sizes) == widest


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        ("select_tokens", r"select \(B=2 H=3 N=13 K=6 E=8\)"),
        ("merge_", r"merge's workspace \(B=2 H=3 K=6 E=8\)"),
        ("compact_", r"compact \(B=2 H=3 N=13 K=6 D=8 of 4 bytes Dv=5 of 4 bytes\)"),
    ],
)
def test_an_error_of_cuda_names_kernel_and_shapes(csrc: Emulator, op: str, shapes: str) -> None:
    given = arguments(op)
    csrc.configure(error=9)
    message = shapes + r": invalid configuration argument \[cudaErrorInvalidConfiguration\]"
    with use_backend("cuda"), pytest.raises(RuntimeError, match=message):
        call(op, given)


def test_a_failing_merge_names_its_shapes(csrc: Emulator) -> None:
    """Its launch, after its workspace was found."""
    key, value = ((0, (0, 0, 0), 8, _native.DTYPES[dtype]) for dtype in (torch.float32, torch.bfloat16))
    csrc.configure(error=1)
    message = r"merge \(B=1 H=2 N=9 K=3 D=8 of 4 bytes Dv=8 of 2 bytes E=4\): invalid argument"
    with pytest.raises(RuntimeError, match=message):
        csrc.module.merge(key, value, key, value, *(7 * [0]), 1, 2, 9, 3, 4, 0, 0, 0)


def test_an_unknown_dtype_is_refused(csrc: Emulator) -> None:
    known, unknown = ((0, (0, 0, 0), 8, tag) for tag in (0, 3))
    for rows in ((known, unknown), (unknown, known)):
        with pytest.raises(ValueError, match="`dtype` must be 0, 1 or 2, got 3"):
            csrc.module.compact(*rows, *rows, 0, 1, 1, 9, 3, 0)


def test_the_backend_is_there_with_its_ops_only(csrc: Emulator) -> None:
    assert why_missing("cuda") is None
    given = {op: arguments(op) for op in OPS}
    key = random(0, 1, 1, 4, 8)
    csrc.configure(error=1)
    with use_backend("cuda"):
        lists = torch.tensor([[[0, 1]]], dtype=torch.int32), torch.tensor([[[2, 3]]], dtype=torch.int32)
        nearest_kept(key, *lists)
        for op in OPS:
            with pytest.raises(RuntimeError, match="invalid argument"):
                call(op, given[op])


def test_the_launchers_never_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without memory, of which whatever reads one raises an error."""
    calls: list[str] = []
    monkeypatch.setattr(_native, "call", lambda launcher, *arguments: calls.append(launcher) or 1024)
    key, value = (torch.empty(2, 8, 4096, width, dtype=torch.bfloat16, device="meta") for width in (128, 80))
    tier = torch.empty(2, 4096, dtype=torch.int32, device="meta")
    kept, evicted = select.select_tokens(torch.empty(2, 8, 4096, device="meta"), tier, [800, 500])
    weights = [torch.empty(indices.shape, device="meta") for indices in (evicted, kept)]
    assert calls == ["select"]
    for outs in ((), (key[:, :, :800], value[:, :, :800])):
        calls.clear()
        merge.merge_(key, value, kept, evicted, torch.empty_like(evicted), *weights, None, None, *outs)
        compact.compact_(key, value, kept, *outs)
        assert calls == ["merge_workspace", "merge", "compact"]
    assert kept.shape == (2, 8, 800)
    assert evicted.shape == (2, 8, 4096 - 500)


@pytest.mark.usefixtures("csrc")
def test_what_the_backend_does_not_take_is_refused() -> None:
    key = random(0, 1, 1, 4, 8, dtype=torch.float64)
    lists = torch.tensor([[[0, 1]]], dtype=torch.int32), torch.tensor([[[2, 3]]], dtype=torch.int32)
    weights = torch.ones(1, 1, 2, dtype=torch.float64)
    tier = torch.ones(1, 4, dtype=torch.int32)
    with use_backend("cuda"):
        with pytest.raises(ValueError, match="backend cuda: float64"):
            select_tokens(key[..., 0], tier, 2)
        with pytest.raises(ValueError, match="backend cuda: float64"):
            merge_(key, key.clone(), *lists, torch.zeros_like(lists[1]), weights, weights)
        with pytest.raises(ValueError, match="backend cuda: float64"):
            compact_(key, key.clone(), lists[0])


def test_kernels_of_a_gpu_are_not_given_memory_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnAGpu:
        device_type = "cuda"

    monkeypatch.setattr(_native, "load", OnAGpu)
    monkeypatch.setattr("lookm_kernels._dispatch.why_missing", lambda backend: None)
    with use_backend("cuda"), pytest.raises(ValueError, match="backend cuda: it has no kernels for tensors on cpu"):
        select_tokens(random(0, 1, 1, 4), torch.ones(1, 4, dtype=torch.int32), 2)
