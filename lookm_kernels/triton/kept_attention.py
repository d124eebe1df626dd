"""Attention over stored pairs, split over the keys: a program owns some keys and all queries of their KV head.

A split has a fixed number of keys, counted from a row's first token that is not padding: neither the batch nor the
padding changes a bit. A second pass adds the splits of a query in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lookm_kernels.triton._configs import FLOAT32, Config, Table, block_and_row, launch, padded_width
from lookm_kernels.triton._lse import LOG2_E, base2_logits

# by chip, then bytes of a padded row: most packed queries, and keys of a tile
SMALL = {128: Config(64, 64, 4, 3), 256: Config(64, 64, 4, 2), 512: Config(32, 32, 4, 2), 1024: Config(16, 32, 4, 1)}
HOPPER = SMALL | {256: Config(64, 64, 4, 3), 512: Config(64, 32, 8, 2)}
CONFIGS = {"sm_80": SMALL, "sm_86": SMALL, "sm_90": HOPPER, "sm_100": HOPPER, "gfx942": SMALL}
# what LOOKM_AUTOTUNE=1 tries
CANDIDATES = [
    Config(64, 128, 4, 3),
    Config(64, 64, 4, 3),
    Config(64, 64, 4, 2),
    Config(32, 64, 4, 3),
    Config(16, 128, 4, 3),
]


class Tiles(NamedTuple):
    """What `launch` chooses from."""

    configs: Table
    candidates: list[Config]
    float32: dict[int, Config] = FLOAT32


# keys of a split where one tile holds all queries of a KV head; twice as many where it takes two, and so on: what the
# splits leave in memory does not grow with the queries
SPLIT_KEYS = 256
FEWEST_ROWS = 16
# two products a step: half the keys of other kernels, or registers do not suffice on small chips
FLOAT32_KEYS = 16
SPLITS_AT_ONCE = 16


@triton.jit
def place_of_program(KV_HEADS, GROUP, M, SPLITS, BLOCK_M: tl.constexpr):
    """(row and head as one, row, head, split, first packed query, packed queries, their queries, heads of the group).

    The heads of a group beside each other for every query: a tile holds queries that see about the same keys.
    """
    block, pid = block_and_row(tl.cdiv(GROUP * M, BLOCK_M) * SPLITS)
    first = block // SPLITS * BLOCK_M
    r = first + tl.arange(0, BLOCK_M)
    return pid, pid // KV_HEADS, pid % KV_HEADS, block % SPLITS, first, r, r // GROUP, r % GROUP


@triton.jit
def weigh(x, top, total):
    """Base-2 logits [BLOCK_M, BLOCK_N] after others, of which `top` is the largest and `total` the sum of exponentials.

    (exponentials over the new top, what sums over the old one are multiplied by, new top, new total).
    """
    new_top = tl.maximum(top, tl.max(x, 1))
    # a query that sees nothing yet has no maximum: 0 keeps its exponentials 0 rather than NaN
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    attention, kept = tl.exp2(x - safe[:, None]), tl.exp2(top - safe)
    return attention, kept, new_top, total * kept + tl.sum(attention, 1)


@triton.jit
def _split_kernel(
    query_ptr, key_ptr, value_ptr, bias_ptr, start_ptr, end_ptr, mask_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_bb, stride_bh, stride_bn, stride_mb, stride_mh, stride_mm, stride_mn,
    KV_HEADS, GROUP, M, N, P, D, DV, scale, softcap, partial_ptr, top_ptr, total_ptr, SPLITS, SPLIT,
    CAUSAL: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    ROWS = GROUP * M
    pid, row, head, split, first, r, m, member = place_of_program(KV_HEADS, GROUP, M, SPLITS, BLOCK_M)
    begin, tokens = split * SPLIT, N
    if HAS_START:
        begin += tl.load(start_ptr + row)
    if HAS_END:
        tokens = tl.load(end_ptr + row)
    end = tokens
    if CAUSAL:
        end = tokens - M + tl.minimum(M, (first + BLOCK_M - 1) // GROUP + 1)
    if begin >= end:
        return
    end = tl.minimum(end, begin + SPLIT)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    query_ptr += row * stride_qb + head * GROUP * stride_qh
    key_ptr += row * stride_kb + head * stride_kh
    value_ptr += row * stride_vb + head * stride_vh
    query_place = member[:, None].to(tl.int64) * stride_qh + m[:, None].to(tl.int64) * stride_qm + d[None, :]
    query = tl.load(query_ptr + query_place, mask=(r < ROWS)[:, None] & (d < D)[None, :], other=0.0)
    if HAS_BIAS:
        bias_ptr += row * stride_bb + head * stride_bh
    if HAS_MASK:
        mask_ptr += row * stride_mb + head * GROUP * stride_mh
        row_place = member.to(tl.int64) * stride_mh + m.to(tl.int64) * stride_mm
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for first_key in range(begin, end, BLOCK_N):
        n = first_key + tl.arange(0, BLOCK_N)
        inside = n < end
        key_place = n[None, :].to(tl.int64) * stride_kn + d[:, None]
        key = tl.load(key_ptr + key_place, mask=inside[None, :] & (d < D)[:, None], other=0.0)
        x, factor = base2_logits(tl.dot(query, key, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        x *= factor
        if HAS_BIAS:
            x += tl.load(bias_ptr + n.to(tl.int64) * stride_bn, mask=inside & (n < P), other=0.0)[None, :] * LOG2_E
        visible = inside[None, :]
        if CAUSAL:
            visible = visible & (n[None, :] <= m[:, None] + (tokens - M))
        if HAS_MASK:
            seen_place = row_place[:, None] + n[None, :].to(tl.int64) * stride_mn
            visible = visible & (tl.load(mask_ptr + seen_place, mask=(r < ROWS)[:, None] & visible, other=0) != 0)
        x = tl.where(visible, x, float("-inf"))
        attention, kept, top, total = weigh(x, top, total)
        value_place = n[:, None].to(tl.int64) * stride_vn + dv[None, :]
        value = tl.load(value_ptr + value_place, mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
        sums = tl.dot(attention.to(value.dtype), value, sums * kept[:, None], input_precision="ieee")
    place = (pid * SPLITS + split) * ROWS + r
    tl.store(top_ptr + place, top, mask=r < ROWS)
    tl.store(total_ptr + place, total, mask=r < ROWS)
    tl.store(partial_ptr + place[:, None] * DV + dv[None, :], sums, mask=(r < ROWS)[:, None] & (dv < DV)[None, :])


@triton.jit
def _combine_kernel(
    partial_ptr, top_ptr, total_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, KV_HEADS, GROUP, M, N, DV, SPLITS, SPLIT,
    CAUSAL: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The splits of one packed query, in order; those after the last key that it sees were not written."""
    ROWS = GROUP * M
    r, pid = block_and_row(ROWS)
    m, member = r // GROUP, r % GROUP
    seen = N
    if HAS_END:
        seen = tl.load(end_ptr + pid // KV_HEADS)
    if CAUSAL:
        seen += m + 1 - M
    if HAS_START:
        seen -= tl.load(start_ptr + pid // KV_HEADS)
    used = tl.cdiv(tl.maximum(0, seen), SPLIT)
    lane, dv = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    highest = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for begin in range(0, used, BLOCK_S):
        place = (pid * SPLITS + begin + lane) * ROWS + r
        highest = tl.maximum(highest, tl.load(top_ptr + place, mask=begin + lane < used, other=float("-inf")))
    top = tl.max(highest, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    totals = tl.zeros([BLOCK_S], tl.float32)
    sums = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    for begin in range(0, used, BLOCK_S):
        there = begin + lane < used
        place = (pid * SPLITS + begin + lane) * ROWS + r
        weight = tl.exp2(tl.load(top_ptr + place, mask=there, other=float("-inf")) - top)
        totals += weight * tl.load(total_ptr + place, mask=there, other=0.0)
        inside = there[:, None] & (dv < DV)[None, :]
        sums += weight[:, None] * tl.load(partial_ptr + place[:, None] * DV + dv[None, :], mask=inside, other=0.0)
    total = tl.sum(totals, 0)
    divisor = tl.where(total == 0, 1.0, total)
    out = tl.div_rn(tl.sum(sums, 0), divisor)
    place = (pid * GROUP + member) * M + m
    tl.store(out_ptr + place * DV + dv, out, mask=dv < DV)
    lse = tl.where(total == 0, float("-inf"), (top + tl.log2(divisor)) / LOG2_E)
    tl.store(lse_ptr + place, lse)


def in_splits(
    op: str,
    kernel: Any,
    arguments: Sequence[Any],
    options: dict[str, Any],
    query: Tensor,
    kv_heads: int,
    tokens: int,
    value_width: int,
    key_start: Tensor | None,
    key_end: Tensor | None,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of query [B, Hq, M, D] over N pairs: `kernel` attends to each split, then they are joined.

    The kernel gets `arguments`, the constants `options`, and where to write.
    """
    batch, heads, queries, width = query.shape
    group = heads // kv_heads
    rows, programs = group * queries, batch * kv_heads
    block_dv = padded_width(value_width, query.dtype)
    out = query.new_empty((batch, heads, queries, value_width))
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    flags = {name: options.get(name, False) for name in ("CAUSAL", "HAS_START", "HAS_END")}

    def run(tile: Config) -> None:
        keys = FLOAT32_KEYS if query.dtype == torch.float32 else tile.columns
        block = min(tile.rows, max(FEWEST_ROWS, triton.next_power_of_2(rows)))
        blocks = triton.cdiv(rows, block)
        split = SPLIT_KEYS * blocks
        splits = triton.cdiv(tokens, split)
        partial = lse.new_empty((programs, splits, rows, value_width))
        top, total = lse.new_empty((2, programs, splits, rows))
        kernel[(programs * blocks * splits,)](
            *arguments, partial_ptr=partial, top_ptr=top, total_ptr=total, SPLITS=splits, SPLIT=split, **options,
            BLOCK_M=block, BLOCK_N=keys, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
        _combine_kernel[(programs * rows,)](
            partial, top, total, key_start, key_end, out, lse, kv_heads, group, queries, tokens, value_width, splits,
            split, **flags, BLOCK_S=SPLITS_AT_ONCE, BLOCK_DV=block_dv, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip

    sizes = (kv_heads, group, queries, tokens, width, value_width, *options.values())
    launch(op, tiles.configs, tiles.candidates, query if width > value_width else out, sizes, run, tiles.float32)
    return out, lse


def kept_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See lookm_kernels.kept_attention."""
    batch, heads, queries, width = query.shape
    kv_heads, tokens, value_width = value.shape[1:]
    key_bias = None if key_bias is None else key_bias.float()
    bias_strides = (0, 0, 0) if key_bias is None else key_bias.stride()
    mask_strides = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, -1, -1).stride()
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *bias_strides, *mask_strides)
    biased = 0 if key_bias is None else key_bias.shape[2]
    sizes = (kv_heads, heads // kv_heads, queries, tokens, biased, width, value_width)
    arguments = (query, key, value, key_bias, key_start, key_end, mask, *strides, *sizes, scale, softcap or 1.0)
    # one query stands at the last key and sees all
    options: dict[str, Any] = {
        "CAUSAL": causal and queries > 1,
        "HAS_START": key_start is not None,
        "HAS_END": key_end is not None,
    }
    options |= {"HAS_BIAS": key_bias is not None, "HAS_MASK": mask is not None, "HAS_SOFTCAP": softcap is not None}
    options |= {"BLOCK_D": padded_width(width, key.dtype), "BLOCK_DV": padded_width(value_width, value.dtype)}
    return in_splits(
        "kept_attention", _split_kernel, arguments, options, query, kv_heads, tokens, value_width, key_start, key_end,
        Tiles(CONFIGS, CANDIDATES),
    )  # fmt: skip
