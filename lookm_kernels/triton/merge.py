"""Merging: evicted tokens sorted by pivot, fixed tiles of that order summed, then one program a pivot.

A tile that lies inside one pivot's run is summed ahead, so a pivot that attracts everything adds tiles, not tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lookm_kernels.triton._configs import block_and_row, padded_width

TILE = 64
BLOCK_E = 16
VOTES_AT_ONCE = 128
WARPS = 4


@triton.jit
def _weighted_sum(
    x_ptr, stride_n, order_ptr, evicted_ptr, weight_ptr, begin, end, D, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sum of weight x over the tokens at places begin to end - 1 of the sorted order: [BLOCK_D] float32."""
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_E):
        place = first + tl.arange(0, BLOCK_E)
        e = tl.load(order_ptr + place, mask=place < end, other=0)
        token = tl.load(evicted_ptr + e, mask=place < end, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + e, mask=place < end, other=0.0)
        mask = (place < end)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + token[:, None] * stride_n + d[None, :], mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32) * weight[:, None], 0)
    return total


@triton.jit
def _tile_kernel(
    key_ptr, value_ptr, sorted_ptr, order_ptr, evicted_ptr, weight_ptr, tiles_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, HEADS, KEPT, EVICTED, TILES, DK, DV,
    TILE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    tile, pid = block_and_row(TILES)
    begin = tile * TILE
    end = begin + TILE
    if end > EVICTED:
        return
    sorted_ptr += pid * EVICTED
    pivot = tl.load(sorted_ptr + begin)
    if (pivot == KEPT) | (pivot != tl.load(sorted_ptr + end - 1)):
        return
    order_ptr += pid * EVICTED
    evicted_ptr += pid * EVICTED
    weight_ptr += pid * EVICTED
    key_ptr += pid // HEADS * stride_kb + pid % HEADS * stride_kh
    value_ptr += pid // HEADS * stride_vb + pid % HEADS * stride_vh
    tiles_ptr += (pid * TILES + tile) * (DK + DV)
    key = _weighted_sum(key_ptr, stride_kn, order_ptr, evicted_ptr, weight_ptr, begin, end, DK, BLOCK_E, BLOCK_DK)
    value = _weighted_sum(value_ptr, stride_vn, order_ptr, evicted_ptr, weight_ptr, begin, end, DV, BLOCK_E, BLOCK_DV)
    dk, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    tl.store(tiles_ptr + dk, key, mask=dk < DK)
    tl.store(tiles_ptr + DK + dv, value, mask=dv < DV)


@triton.jit
def _copy_row(x_ptr, stride_n, out_ptr, token, D, BLOCK_D: tl.constexpr):
    """The row of a token as it is, zeros for no token (-1)."""
    d = tl.arange(0, BLOCK_D)
    own = tl.load(x_ptr + token * stride_n + d, mask=d < tl.where(token >= 0, D, 0), other=0.0)
    tl.store(out_ptr + d, own, mask=d < D)


@triton.jit
def _merge_row(
    x_ptr, stride_n, out_ptr, tiles_ptr, stride_tile, order_ptr, evicted_ptr, weight_ptr, token, own_weight, begin, end,
    D, TILE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    first_tile, last_tile = tl.cdiv(begin, TILE), end // TILE
    total = own_weight * tl.load(x_ptr + token * stride_n + d, mask=d < D, other=0.0).to(tl.float32)
    # tokens before the first whole tile, the whole tiles, the tokens after the last
    head_end = tl.minimum(end, first_tile * TILE)
    total += _weighted_sum(x_ptr, stride_n, order_ptr, evicted_ptr, weight_ptr, begin, head_end, D, BLOCK_E, BLOCK_D)
    for first in range(first_tile, last_tile, BLOCK_E):
        tile = first + tl.arange(0, BLOCK_E)
        place = tile[:, None].to(tl.int64) * stride_tile + d[None, :]
        total += tl.sum(tl.load(tiles_ptr + place, mask=(tile < last_tile)[:, None] & (d < D)[None, :], other=0.0), 0)
    tail = tl.maximum(head_end, last_tile * TILE)
    total += _weighted_sum(x_ptr, stride_n, order_ptr, evicted_ptr, weight_ptr, tail, end, D, BLOCK_E, BLOCK_D)
    tl.store(out_ptr + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _merge_kernel(
    key_ptr, value_ptr, out_key_ptr, out_value_ptr, kept_ptr, starts_ptr, order_ptr, evicted_ptr, weight_ptr,
    kept_weight_ptr, tiles_ptr, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_okb,
    stride_okh, stride_okn, stride_ovb, stride_ovh, stride_ovn, HEADS, KEPT, EVICTED, TILES, DK, DV,
    TILE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    c, pid = block_and_row(KEPT)
    token = tl.load(kept_ptr + pid * KEPT + c).to(tl.int64)
    begin = tl.load(starts_ptr + pid * (KEPT + 1) + c)
    end = tl.load(starts_ptr + pid * (KEPT + 1) + c + 1)
    own_weight = tl.load(kept_weight_ptr + pid * KEPT + c)
    row = token if IN_PLACE else c.to(tl.int64)
    key_ptr += pid // HEADS * stride_kb + pid % HEADS * stride_kh
    value_ptr += pid // HEADS * stride_vb + pid % HEADS * stride_vh
    out_key_ptr += pid // HEADS * stride_okb + pid % HEADS * stride_okh + row * stride_okn
    out_value_ptr += pid // HEADS * stride_ovb + pid % HEADS * stride_ovh + row * stride_ovn
    # an empty place, or nothing to change: the row keeps its bits
    if (token < 0) | ((begin == end) & (own_weight == 1)):
        if not IN_PLACE:
            _copy_row(key_ptr, stride_kn, out_key_ptr, token, DK, BLOCK_DK)
            _copy_row(value_ptr, stride_vn, out_value_ptr, token, DV, BLOCK_DV)
        return
    order_ptr += pid * EVICTED
    evicted_ptr += pid * EVICTED
    weight_ptr += pid * EVICTED
    tiles_ptr += pid * TILES * (DK + DV)
    # values first: in the other order ptxas spills a register on an RTX GPU
    _merge_row(
        value_ptr, stride_vn, out_value_ptr, tiles_ptr + DK, DK + DV, order_ptr, evicted_ptr, weight_ptr, token,
        own_weight, begin, end, DV, TILE, BLOCK_E, BLOCK_DV,
    )  # fmt: skip
    _merge_row(
        key_ptr, stride_kn, out_key_ptr, tiles_ptr, DK + DV, order_ptr, evicted_ptr, weight_ptr, token, own_weight,
        begin, end, DK, TILE, BLOCK_E, BLOCK_DK,
    )  # fmt: skip


@triton.jit
def _votes_kernel(
    out_ptr, votes_ptr, kept_ptr, starts_ptr, order_ptr, evicted_ptr, N, KEPT, EVICTED, BLOCK_E: tl.constexpr,
    HAS_VOTES: tl.constexpr,
):  # fmt: skip
    c, pid = block_and_row(KEPT)
    token = tl.load(kept_ptr + pid * KEPT + c)
    begin = tl.load(starts_ptr + pid * (KEPT + 1) + c)
    end = tl.load(starts_ptr + pid * (KEPT + 1) + c + 1)
    total = 1.0 + (end - begin).to(tl.float32)
    if HAS_VOTES:
        votes_ptr += pid * N
        total = tl.load(votes_ptr + token, mask=token >= 0, other=0.0)
        for first in range(begin, end, BLOCK_E):
            place = first + tl.arange(0, BLOCK_E)
            e = tl.load(order_ptr + pid * EVICTED + place, mask=place < end, other=0)
            merged = tl.load(evicted_ptr + pid * EVICTED + e, mask=place < end, other=0)
            total += tl.sum(tl.load(votes_ptr + merged, mask=place < end, other=0.0), 0)
    tl.store(out_ptr + pid * KEPT + c, tl.where(token >= 0, total, 0.0))


def merge_(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    evicted: Tensor,
    pivot: Tensor,
    evicted_weight: Tensor,
    kept_weight: Tensor,
    votes: Tensor | None = None,
    out_votes: Tensor | None = None,
    out_key: Tensor | None = None,
    out_value: Tensor | None = None,
) -> None:
    """See lookm_kernels.merge_."""
    batch, heads, kept_size = kept.shape
    evicted_size = evicted.shape[2]
    if kept_size == 0:
        return
    merges = (evicted >= 0) & (pivot >= 0) & (evicted_weight != 0)
    ordered, order = torch.where(merges, pivot, kept_size).sort(dim=-1, stable=True)
    places = torch.arange(kept_size + 1, dtype=torch.int32, device=key.device).expand(batch, heads, -1).contiguous()
    starts = torch.searchsorted(ordered, places, out_int32=True)
    if out_votes is not None:
        _votes_kernel[(kept_size * batch * heads,)](
            out_votes, out_votes if votes is None else votes.contiguous(), kept.contiguous(), starts, order,
            evicted.contiguous(), key.shape[2], kept_size, evicted_size, BLOCK_E=VOTES_AT_ONCE,
            HAS_VOTES=votes is not None, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    tiles = max(1, evicted_size // TILE)
    widths = (key.shape[3], value.shape[3])
    sums = key.new_empty((batch, heads, tiles, sum(widths)), dtype=torch.float32)
    outs = (key, value) if out_key is None or out_value is None else (out_key, out_value)
    strides, out_strides = ([stride for x in pair for stride in x.stride()[:3]] for pair in ((key, value), outs))
    blocks = {"BLOCK_DK": padded_width(widths[0], key.dtype), "BLOCK_DV": padded_width(widths[1], value.dtype)}
    lists = (order, evicted.contiguous(), evicted_weight.contiguous())
    _tile_kernel[(tiles * batch * heads,)](
        key, value, ordered, *lists, sums, *strides, heads, kept_size, evicted_size, tiles, *widths,
        TILE=TILE, BLOCK_E=BLOCK_E, **blocks, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    _merge_kernel[(kept_size * batch * heads,)](
        key, value, *outs, kept.contiguous(), starts, *lists, kept_weight.contiguous(), sums, *strides, *out_strides,
        heads, kept_size, evicted_size, tiles, *widths, TILE=TILE, BLOCK_E=BLOCK_E, **blocks, IN_PLACE=out_key is None,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
