"""Quantisation: a program owns some tokens of a head, 64 in 4 bits, counted from a row's first, and uses float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lookm_kernels._formats import BLOCK, LARGEST, LEAST_STEP
from lookm_kernels.triton._configs import block_and_row

# elements of a tile that one program holds
TILE = 4096
WARPS = 4
INFINITY = tl.constexpr(float("inf"))
# of numbers this large only whole ones are float32
WHOLE = tl.constexpr(1.5 * 2.0**23)
# and here multiples of the least float8_e4m3fn
LEAST_FLOAT8 = tl.constexpr(2.0**14)


@triton.jit
def _nearest(x):
    """The nearest whole number, ties to even."""
    return (x + WHOLE) - WHOLE


@triton.jit
def _float8_bits(x):
    """The bits of the nearest float8_e4m3fn, ties to even, of numbers up to 448; chips older than 8.9 have no such."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.abs(x)
    small = (size + LEAST_FLOAT8).to(tl.int32, bitcast=True) & 0xFF
    whole = size.to(tl.int32, bitcast=True)
    # 3 bits of fraction; the exponent's bias is 120 less
    large = ((whole + 0x7FFFF + ((whole >> 20) & 1)) >> 20) - (120 << 3)
    return tl.where(size < 2.0**-6, small, large) | ((bits >> 24) & 0x80)


@triton.jit
def _symmetric_kernel(
    x_ptr, codes_ptr, scale_ptr, start_ptr, stride_b, stride_h, stride_n, HEADS, N, D, LARGEST_CODE, LEAST,
    HAS_START: tl.constexpr, FLOAT8: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, pid = block_and_row(tl.cdiv(N, BLOCK_N))
    row, head = pid // HEADS, pid % HEADS
    begin = block * BLOCK_N
    if HAS_START:
        begin += tl.load(start_ptr + row)
    n, d = begin + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    x_ptr += row * stride_b + head * stride_h
    x = tl.load(x_ptr + n[:, None].to(tl.int64) * stride_n + d[None, :], mask=inside, other=0.0).to(tl.float32)
    bad = tl.max((tl.abs(x) < INFINITY).to(tl.int32) ^ 1, 1) != 0
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 1), LARGEST_CODE), LEAST)
    steps = tl.where(bad[:, None], 0.0, tl.div_rn(x, scale[:, None] + tl.zeros_like(x)))
    codes = _float8_bits(steps) if FLOAT8 else _nearest(steps).to(tl.int32)
    place = pid * N + n
    tl.store(scale_ptr + place, tl.where(bad, float("nan"), scale), mask=n < N)
    tl.store(codes_ptr + place[:, None] * D + d[None, :], codes.to(tl.int8), mask=inside)


@triton.jit
def _steps(x, scale, least, bad, AXIS: tl.constexpr):
    """The codes of x as int32, for a scale and a least number by what AXIS leaves."""
    steps = tl.div_rn(x - tl.expand_dims(least, AXIS), tl.expand_dims(scale, AXIS) + tl.zeros_like(x))
    steps = tl.minimum(tl.maximum(_nearest(steps), 0.0), 15.0)
    return tl.where(tl.expand_dims(bad, AXIS), 0.0, steps).to(tl.int32)


@triton.jit
def _half(x_ptr, scale_ptr, zero_ptr, place, inside, shared, used, LEAST, AXIS: tl.constexpr):
    """The codes of one half of the channels; stores the scale and the zero of what lies along AXIS at `shared`."""
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    least = tl.min(tl.where(inside, x, INFINITY), AXIS)
    extent = tl.max(tl.where(inside, x, -INFINITY), AXIS) - least
    bad = (tl.max((inside & ~(tl.abs(x) < INFINITY)).to(tl.int32), AXIS) != 0) | ~(extent < INFINITY)
    type = scale_ptr.dtype.element_ty
    scale = tl.maximum(tl.div_rn(extent, 15.0), LEAST).to(type)
    tl.store(scale_ptr + shared, tl.where(bad, float("nan"), scale.to(tl.float32)).to(type), mask=used)
    tl.store(zero_ptr + shared, tl.where(bad, float("nan"), least).to(type), mask=used)
    return _steps(x, scale.to(tl.float32), least, bad, AXIS)


@triton.jit
def _affine_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, start_ptr, stride_b, stride_h, stride_n, HEADS, N, HALF, SLABS, SHARED,
    LEAST, AXIS: tl.constexpr, HAS_START: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """64 tokens and 64 bytes of each: keys (AXIS 0) have a scale for each channel, values (1) for a token's halves."""
    program, pid = block_and_row(tl.cdiv(N, BLOCK_N) * SLABS)
    block, slab = program // SLABS, program % SLABS
    row, head = pid // HEADS, pid % HEADS
    begin = block * BLOCK_N
    if HAS_START:
        begin += tl.load(start_ptr + row)
    n, d = begin + tl.arange(0, BLOCK_N), slab * BLOCK_D + tl.arange(0, BLOCK_D)
    if begin >= N:
        return
    inside = (n < N)[:, None] & (d < HALF)[None, :]
    x_ptr += row * stride_b + head * stride_h
    place = n[:, None].to(tl.int64) * stride_n + d[None, :]
    # scales are [SHARED, D] or [SHARED, 2 SLABS] of a head
    if AXIS == 0:
        shared, used, next_half = (pid * SHARED + block) * 2 * HALF + d, d < HALF, HALF
    else:
        shared, used, next_half = (pid * SHARED + n) * 2 * SLABS + slab, n < N, SLABS
    low = _half(x_ptr, scale_ptr, zero_ptr, place, inside, shared, used, LEAST, AXIS)
    high = _half(x_ptr + HALF, scale_ptr, zero_ptr, place, inside, shared + next_half, used, LEAST, AXIS)
    tl.store(codes_ptr + (pid * N + n)[:, None] * HALF + d[None, :], (low | (high << 4)).to(tl.uint8), mask=inside)


def quantize_pairs(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, format: str, of_keys: bool, key_start: Tensor | None
) -> None:
    """Keys or values x [B, H, N, D] into codes, scale and zero; see lookm_kernels.quantize_pairs."""
    batch, heads, tokens, width = x.shape
    options = {"HAS_START": key_start is not None, "num_warps": WARPS, "enable_fp_fusion": False}
    if format != "int4":
        columns = max(16, triton.next_power_of_2(width))
        rows = max(1, TILE // columns)
        _symmetric_kernel[(triton.cdiv(tokens, rows) * batch * heads,)](
            x, codes.view(torch.int8), scale, key_start, *x.stride()[:3], heads, tokens, width, LARGEST[format],
            LEAST_STEP[torch.float32], FLOAT8=format == "fp8", BLOCK_N=rows, BLOCK_D=columns, **options,
        )  # fmt: skip
        return
    slabs = triton.cdiv(width // 2, BLOCK)
    _affine_kernel[(triton.cdiv(tokens, BLOCK) * slabs * batch * heads,)](
        x, codes, scale, zero, key_start, *x.stride()[:3], heads, tokens, width // 2, slabs, scale.shape[2],
        LEAST_STEP[x.dtype], AXIS=0 if of_keys else 1, BLOCK_N=BLOCK, BLOCK_D=BLOCK, **options,
    )  # fmt: skip
