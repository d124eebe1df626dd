"""Attention over quantised pairs, split over the keys as kept_attention's.

What multiplies all of a key or value is applied to the few numbers beside it instead: its scale to the logits and to
the attention, in 4 bits a block's scale of every channel to the query. Codes have few bits, and the dtype of the query
holds them as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lookm_kernels._checks import FP8
from lookm_kernels._formats import BLOCK, CENTRE, blocks_of
from lookm_kernels.triton._configs import Config, padded_width
from lookm_kernels.triton._lse import LOG2_E, base2_logits
from lookm_kernels.triton.kept_attention import Tiles, in_splits, place_of_program, weigh

# by chip, then bytes of a padded row of the output: at most BLOCK keys, in which a tile of 4-bit keys must lie
SMALL = {128: Config(32, 32, 4, 3), 256: Config(32, 32, 4, 3), 512: Config(32, 32, 8, 2), 1024: Config(16, 16, 8, 1)}
AMD = SMALL | {512: Config(16, 32, 4, 2), 1024: Config(16, 16, 4, 1)}
CONFIGS = {"sm_80": SMALL, "sm_86": SMALL, "sm_90": SMALL, "sm_100": SMALL, "gfx942": AMD}
WIDE = {1024: Config(16, 32, 8, 1), 2048: Config(16, 16, 8, 1)}
FLOAT32 = dict.fromkeys((128, 256, 512), Config(32, 32, 4, 2)) | WIDE
# what LOOKM_AUTOTUNE=1 tries
CANDIDATES = [
    Config(32, 64, 4, 3),
    Config(32, 64, 4, 2),
    Config(32, 32, 4, 3),
    Config(16, 64, 4, 3),
    Config(64, 64, 8, 2),
]
KEYS_OF_BLOCK = tl.constexpr(BLOCK)
MIDDLE = tl.constexpr(CENTRE)
# float16 would round a small scale to nothing: about half of the largest number, at most, takes its place
UNITS = {("int8", torch.float16): 64.0, ("int4", torch.float16): 4.0}


@triton.jit
def _numbers(bits, dtype: tl.constexpr, UNIT: tl.constexpr, FLOAT8: tl.constexpr):
    """Codes of 8 bits as numbers, UNIT times too small."""
    if FLOAT8:
        # exponent and fraction to where float16 has them, whose bias is 8 more; the sign is in the highest bit already
        return ((bits.to(tl.int16) << 7) & ~(1 << 14)).to(tl.float16, bitcast=True).to(dtype)
    if UNIT == 1:
        return bits.to(dtype)
    return bits.to(dtype) * (1 / UNIT)


@triton.jit
def _halves(bits, dtype: tl.constexpr, UNIT: tl.constexpr):
    """Codes of 4 bits less MIDDLE, UNIT times too small: those in the low half of the bytes, and in the high."""
    low, high = (bits & 15).to(tl.int8) - MIDDLE, (bits >> 4).to(tl.int8) - MIDDLE
    return _numbers(low, dtype, UNIT, False), _numbers(high, dtype, UNIT, False)


@triton.jit
def _scaled_query(query, scale_ptr, zero_ptr, place, inside):
    """One half of the query times a block's scales, and its product with what code MIDDLE stands for."""
    scale = tl.load(scale_ptr + place, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + place, mask=inside, other=0.0).to(tl.float32) + scale * MIDDLE
    whole = query.to(tl.float32)
    return (whole * scale[None, :]).to(query.dtype), tl.sum(whole * zero[None, :], 1)


@triton.jit
def _add_half(
    sums, attention, numbers, scale_ptr, zero_ptr, place, inside, dv, HALF, GROUPS: tl.constexpr, UNIT: tl.constexpr
):
    """sums + attention * the values whose groups have their scales at `place` and behind."""
    if GROUPS == 1:
        scale = tl.load(scale_ptr + place, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + place, mask=inside, other=0.0).to(tl.float32) + scale * MIDDLE
        weights = (attention * (scale * UNIT)[None, :]).to(numbers.dtype)
        sums += tl.sum(attention * zero[None, :], 1)[:, None]
        return tl.dot(weights, numbers, sums, input_precision="ieee")
    place = place[:, None] + (dv // KEYS_OF_BLOCK)[None, :]
    within = inside[:, None] & (dv < HALF)[None, :]
    scale = tl.load(scale_ptr + place, mask=within, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + place, mask=within, other=0.0).to(tl.float32) + scale * MIDDLE
    value = (numbers.to(tl.float32) * (scale * UNIT) + zero).to(numbers.dtype)
    return tl.dot(attention.to(numbers.dtype), value, sums, input_precision="ieee")


@triton.jit
def _quantized_kernel(
    query_ptr, key_ptr, key_scale_ptr, key_zero_ptr, value_ptr, value_scale_ptr, value_zero_ptr,
    bias_ptr, start_ptr, end_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_bb, stride_bh, stride_bn,
    KV_HEADS, GROUP, M, N, P, D, DV, WIDTH, BLOCKS, scale, softcap, partial_ptr, top_ptr, total_ptr, SPLITS, SPLIT,
    PACKED: tl.constexpr, FLOAT8: tl.constexpr, GROUPS: tl.constexpr, KEY_UNIT: tl.constexpr, UNIT: tl.constexpr,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """D and DV: elements of a key and a value, bytes in 4 bits; WIDTH: channels of the output."""
    ROWS = GROUP * M
    pid, row, head, split, _, r, m, member = place_of_program(KV_HEADS, GROUP, M, SPLITS, BLOCK_M)
    start, end = 0, N
    if HAS_START:
        start = tl.load(start_ptr + row)
    if HAS_END:
        end = tl.load(end_ptr + row)
    begin = start + split * SPLIT
    if begin >= end:
        return
    end = tl.minimum(end, begin + SPLIT)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    query_ptr += row * stride_qb + head * GROUP * stride_qh
    key_ptr += row * stride_kb + head * stride_kh
    value_ptr += row * stride_vb + head * stride_vh
    place = member[:, None].to(tl.int64) * stride_qh + m[:, None].to(tl.int64) * stride_qm + d[None, :]
    present = (r < ROWS)[:, None] & (d < D)[None, :]
    query = tl.load(query_ptr + place, mask=present, other=0.0)
    sums = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if PACKED:
        query_high = tl.load(query_ptr + D + place, mask=present, other=0.0)
        sums_high = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if HAS_BIAS:
        bias_ptr += row * stride_bb + head * stride_bh
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first_key in range(begin, end, BLOCK_N):
        n = first_key + tl.arange(0, BLOCK_N)
        inside = n < end
        key_place = n[None, :].to(tl.int64) * stride_kn + d[:, None]
        bits = tl.load(key_ptr + key_place, mask=inside[None, :] & (d < D)[:, None], other=0)
        if PACKED:
            # a tile is within a block
            shared = (pid * BLOCKS + (first_key - start) // KEYS_OF_BLOCK) * 2 * D + d
            low, shift = _scaled_query(query, key_scale_ptr, key_zero_ptr, shared, d < D)
            high, shift_high = _scaled_query(query_high, key_scale_ptr, key_zero_ptr, shared + D, d < D)
            low_key, high_key = _halves(bits, query.dtype, 1)
            product = tl.dot(low, low_key, input_precision="ieee")
            product = tl.dot(high, high_key, product, input_precision="ieee") + (shift + shift_high)[:, None]
        else:
            product = tl.dot(query, _numbers(bits, query.dtype, 1, FLOAT8), input_precision="ieee")
            product *= tl.load(key_scale_ptr + pid * N + n, mask=inside, other=0.0)[None, :] * KEY_UNIT
        x, factor = base2_logits(product, scale, softcap, HAS_SOFTCAP)
        x *= factor
        if HAS_BIAS:
            x += tl.load(bias_ptr + n.to(tl.int64) * stride_bn, mask=inside & (n < P), other=0.0)[None, :] * LOG2_E
        x = tl.where(inside[None, :], x, float("-inf"))
        attention, kept, top, total = weigh(x, top, total)
        value_place = n[:, None].to(tl.int64) * stride_vn + dv[None, :]
        bits = tl.load(value_ptr + value_place, mask=inside[:, None] & (dv < DV)[None, :], other=0)
        if PACKED:
            shared = (pid * N + n) * 2 * GROUPS
            low_value, high_value = _halves(bits, query.dtype, UNIT)
            sums = _add_half(
                sums * kept[:, None], attention, low_value, value_scale_ptr, value_zero_ptr, shared, inside, dv, DV,
                GROUPS, UNIT,
            )  # fmt: skip
            sums_high = _add_half(
                sums_high * kept[:, None], attention, high_value, value_scale_ptr, value_zero_ptr, shared + GROUPS,
                inside, dv, DV, GROUPS, UNIT,
            )  # fmt: skip
        else:
            weights = attention * (tl.load(value_scale_ptr + pid * N + n, mask=inside, other=0.0) * UNIT)[None, :]
            value = _numbers(bits, query.dtype, UNIT, FLOAT8)
            sums = tl.dot(weights.to(query.dtype), value, sums * kept[:, None], input_precision="ieee")
    place_of_split = (pid * SPLITS + split) * ROWS + r
    tl.store(top_ptr + place_of_split, top, mask=r < ROWS)
    tl.store(total_ptr + place_of_split, total, mask=r < ROWS)
    partial_ptr += place_of_split[:, None] * WIDTH + dv[None, :]
    written = (r < ROWS)[:, None] & (dv < DV)[None, :]
    tl.store(partial_ptr, sums, mask=written)
    if PACKED:
        tl.store(partial_ptr + DV, sums_high, mask=written)


def quantized_attention(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    key_zero: Tensor | None,
    value: Tensor,
    value_scale: Tensor,
    value_zero: Tensor | None,
    key_bias: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See lookm_kernels.quantized_attention."""
    heads, queries = query.shape[1:3]
    kv_heads, tokens, value_width = value.shape[1:]
    packed = key_zero is not None
    float8 = key.dtype == FP8
    if float8:
        key, value = key.view(torch.int8), value.view(torch.int8)
    width = 2 * value_width if packed else value_width
    unit = 2.0**8 if float8 else UNITS.get(("int4" if packed else "int8", query.dtype), 1.0)
    key_bias = None if key_bias is None else key_bias.float()
    bias_strides = (0, 0, 0) if key_bias is None else key_bias.stride()
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *bias_strides)
    biased = 0 if key_bias is None else key_bias.shape[2]
    sizes = (kv_heads, heads // kv_heads, queries, tokens, biased, key.shape[3], value_width, width, blocks_of(tokens))
    scales = [None if x is None else x.contiguous() for x in (key_scale, key_zero, value_scale, value_zero)]
    tensors = (query, key, *scales[:2], value, *scales[2:], key_bias, key_start, key_end)
    options = {
        "PACKED": packed,
        "FLOAT8": float8,
        "GROUPS": blocks_of(value_width),
        "KEY_UNIT": unit if float8 else 1.0,
        "UNIT": unit,
        "HAS_START": key_start is not None,
        "HAS_END": key_end is not None,
        "HAS_BIAS": key_bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK_D": padded_width(key.shape[3], query.dtype),
        "BLOCK_DV": padded_width(value_width, query.dtype),
    }
    arguments = (*tensors, *strides, *sizes, scale, softcap or 1.0)
    return in_splits(
        "quantized_attention", _quantized_kernel, arguments, options, query, kv_heads, tokens, width, key_start,
        key_end, Tiles(CONFIGS, CANDIDATES, FLOAT32),
    )  # fmt: skip
