"""kept_attention in a decode step: one query over stored pairs with votes, beside SDPA without.

quantized_attention reads the same pairs in 8 and 4 bits, without votes; they are quantised outside the clock.

SDPA gets grouped heads as they are (enable_gqa) and no bias: a mask of floats would keep it from its flash kernel.
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
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import lookm_kernels

HEADS, WIDTH = (4, 64) if timing.SMALL else (32, 128)
# batch, KV heads, stored pairs
SHAPES = (
    [(1, 2, 160), (2, 4, 600)]
    if timing.SMALL
    else [(batch, heads, tokens) for batch in (1, 8) for heads in (8, 32) for tokens in (1600, 6500, 32768)]
)
WHAT = "decode step"
FORMATS = ("int8", "fp8", "int4")
# a few query heads a KV head, as models have that are quantised for their memory
GROUPED = [shape for shape in SHAPES if shape[1] < HEADS]


class Inputs(NamedTuple):
    """query [B, Hq, 1, D]; key and value [B, H, N, D]; bias [B, H, N]."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor


def random_inputs(batch: int, kv_heads: int, tokens: int) -> Inputs:
    query = torch.randn(batch, HEADS, 1, WIDTH, device=timing.DEVICE, dtype=timing.DTYPE)
    key, value = torch.randn(2, batch, kv_heads, tokens, WIDTH, device=timing.DEVICE, dtype=timing.DTYPE).unbind()
    return Inputs(query, key, value, torch.randint(1, 9, key.shape[:3], device=timing.DEVICE).float().log())


def with_votes(inputs: Inputs) -> Tensor:
    return lookm_kernels.kept_attention(*inputs[:3], key_bias=inputs.bias)


def without_votes(inputs: Inputs) -> Tensor:
    return lookm_kernels.kept_attention(*inputs[:3])


def sdpa(inputs: Inputs) -> Tensor:
    return scaled_dot_product_attention(*inputs[:3], enable_gqa=True)


VARIANTS: dict[str, tuple[str, Callable[[Inputs], Tensor]]] = {
    "votes": (f"{OURS}, votes", with_votes),
    "no_votes": (OURS, without_votes),
    "sdpa": ("SDPA", sdpa),
}


def expected_result(inputs: Inputs, votes: bool) -> Tensor:
    """In float32, from the whole matrix."""
    group = HEADS // inputs.key.shape[1]
    key, value = (x.float().repeat_interleave(group, 1) for x in (inputs.key, inputs.value))
    logits = inputs.query.float() @ key.mT * WIDTH**-0.5
    if votes:
        logits += inputs.bias.repeat_interleave(group, 1)[:, :, None]
    return logits.softmax(-1) @ value


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_decode_step(
    benchmark: BenchmarkFixture, record: timing.Record, variant: str, shape: tuple[int, int, int]
) -> None:
    by, call = VARIANTS[variant]
    first = random_inputs(*shape)
    assert timing.relative_error(call(first), expected_result(first, variant == "votes")) < 2e-2
    count = timing.input_sets(first.key.nbytes + first.value.nbytes)
    sets = [first, *(random_inputs(*shape) for _ in range(count - 1))]
    measured = timing.measure(benchmark, [lambda inputs=inputs: call(inputs) for inputs in sets])
    batch, kv_heads, tokens = shape
    sizes = {"batch": batch, "heads": HEADS, "kv_heads": kv_heads, "tokens": tokens, "width": WIDTH}
    record.add(benchmark, WHAT, by, sizes, work.decode(**sizes), measured)


@pytest.mark.parametrize("shape", GROUPED, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_decode_step_over_quantised_pairs(
    benchmark: BenchmarkFixture, record: timing.Record, format: str, shape: tuple[int, int, int]
) -> None:
    first = random_inputs(*shape)
    count = timing.input_sets(lookm_kernels.quantize_pairs(first.key, first.value, format).nbytes)
    inputs = [first, *(random_inputs(*shape) for _ in range(count - 1))]
    sets = [(each.query, lookm_kernels.quantize_pairs(each.key, each.value, format)) for each in inputs]
    stored = first._replace(**dict(zip(("key", "value"), lookm_kernels.dequantize_pairs(sets[0][1]), strict=True)))
    found = lookm_kernels.quantized_attention(*sets[0])[0]
    assert timing.relative_error(found, expected_result(stored, votes=False)) < 2e-2
    calls = [lambda own=own: lookm_kernels.quantized_attention(*own) for own in sets]
    del inputs, stored, found
    measured = timing.measure(benchmark, calls)
    batch, kv_heads, tokens = shape
    sizes = {"batch": batch, "heads": HEADS, "kv_heads": kv_heads, "tokens": tokens, "width": WIDTH}
    moved = work.quantized_decode(**sizes, bytes_of_pairs=sets[0][1].nbytes)
    record.add(benchmark, WHAT, f"{OURS}, {format}", sizes, moved, measured)
