"""Column sums of the attention matrix: a log-sum-exp pass where it is not given, then one key-stationary pass.

A program owns a block of keys of one query head and walks the queries that see it: every sum has one writer and a fixed
order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lookm_kernels.triton import _lse
from lookm_kernels.triton._configs import Config, block_and_row, launch, padded_width
from lookm_kernels.triton._lse import base2_logits, first_query, positions

# by chip, then bytes of a padded row: queries and keys of a tile
SMALL = {128: Config(64, 128, 8, 3), 256: Config(64, 128, 8, 3), 512: Config(32, 64, 4, 2), 1024: Config(32, 32, 4, 2)}
# the matrix instructions of Hopper take no fewer than 64 rows, those of Blackwell 128
HOPPER = SMALL | {512: Config(64, 64, 4, 2)}
BLACKWELL = HOPPER | {128: Config(128, 128, 8, 2), 256: Config(128, 128, 8, 2)}
CONFIGS = {"sm_80": SMALL, "sm_86": SMALL, "sm_90": HOPPER, "sm_100": BLACKWELL, "gfx942": SMALL}
# what LOOKM_AUTOTUNE=1 tries
CANDIDATES = [
    Config(64, 128, 8, 3),
    Config(64, 128, 4, 3),
    Config(128, 128, 8, 2),
    Config(64, 256, 8, 2),
    Config(64, 64, 4, 3),
]
# few heads make few programs, which then share a block's queries; by the heads alone, so that the batch changes no bit
WANTED_HEADS = 16
SUM_BLOCK = 1024
SCAN = 1024


@triton.jit
def _add_queries(
    sums, key, n, begin, end, query_ptr, lse_ptr, weight_ptr, position_ptr, mask_ptr, stride_qm, stride_mm, stride_mn,
    M, N, D, scale, softcap,
    COMPARE: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the attention that queries begin to end - 1 pay to the keys n: sums [BLOCK_M, BLOCK_N] float32."""
    d = tl.arange(0, BLOCK_D)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        used = m < end
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + m, mask=used, other=0.0)
            used = weight != 0
        place = m[:, None].to(tl.int64) * stride_qm + d[None, :]
        query = tl.load(query_ptr + place, mask=used[:, None] & (d < D)[None, :], other=0.0)
        # infinity leaves a query out: its exponentials are 0
        lse = tl.load(lse_ptr + m, mask=used, other=float("inf"))
        x, factor = base2_logits(tl.dot(query, key, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        attention = tl.exp2(tl.fma(x, factor, -lse[:, None]))
        if HAS_WEIGHT:
            attention *= weight[:, None]
        if HAS_WEIGHT or HAS_POSITION:
            # of a key that is no number a query left out knows nothing; without these the last query sees every key
            attention = tl.where(used[:, None], attention, 0.0)
        if COMPARE:
            position = positions(position_ptr, m, M, N, HAS_POSITION)
            attention = tl.where(n[None, :] <= position[:, None], attention, 0.0)
        if HAS_MASK:
            place = m[:, None].to(tl.int64) * stride_mm + n[None, :].to(tl.int64) * stride_mn
            seen = tl.load(mask_ptr + place, mask=used[:, None] & (n < N)[None, :], other=0) != 0
            attention = tl.where(seen, attention, 0.0)
        sums += attention
    return sums


@triton.jit
def _queries_before(position_ptr, token, M, N, HAS_POSITION: tl.constexpr, SCAN: tl.constexpr):
    """How many queries of a row, empty places included, stand before a token."""
    count = tl.minimum(M, tl.maximum(0, token - (N - M)))
    if HAS_POSITION:
        count = 0
        for begin in range(0, M, SCAN):
            m = begin + tl.arange(0, SCAN)
            count += tl.sum((positions(position_ptr, m, M, N, True) < token).to(tl.int32))
    return count


@triton.jit
def _scores_kernel(
    query_ptr, key_ptr, lse_ptr, weight_ptr, start_ptr, first_ptr, position_ptr, head_scale_ptr, mask_ptr, partial_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_mb, stride_mh, stride_mm, stride_mn,
    HEADS, GROUP, M, N, D, scale, softcap,
    CAUSAL: tl.constexpr, HAS_START: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_HEAD_SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WEIGHT: tl.constexpr, SPLITS: tl.constexpr,
    SCAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # under a causal mask the first keys are seen by the most queries: heavy programs first
    block, pid = block_and_row(tl.cdiv(N, BLOCK_N))
    row, head = pid // HEADS, pid % HEADS
    start, begin = first_query(start_ptr, first_ptr, row, M, N, HAS_START, HAS_POSITION)
    first_key = start + block * BLOCK_N
    if first_key >= N:
        return
    n = first_key + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    key_ptr += row * stride_kb + (head // GROUP) * stride_kh
    place = n[None, :].to(tl.int64) * stride_kn + d[:, None]
    key = tl.load(key_ptr + place, mask=(n < N)[None, :] & (d < D)[:, None], other=0.0)
    query_ptr += row * stride_qb + head * stride_qh
    lse_ptr += pid * M
    if HAS_HEAD_SCALE:
        scale *= tl.load(head_scale_ptr + pid)
    if HAS_POSITION:
        position_ptr += row * M
    if HAS_WEIGHT:
        weight_ptr += (row * tl.num_programs(2) + tl.program_id(2)) * M
    if HAS_MASK:
        mask_ptr += row * stride_mb + head * stride_mh
    # blocks of queries before the first that sees a key of the block, and before the first that sees them all
    unseeing, partly = 0, 0
    if CAUSAL:
        before = _queries_before(position_ptr, first_key, M, N, HAS_POSITION, SCAN)
        unseeing = tl.maximum(0, before - begin) // BLOCK_M
        before = _queries_before(position_ptr, first_key + BLOCK_N - 1, M, N, HAS_POSITION, SCAN)
        partly = tl.cdiv(tl.maximum(0, before - begin), BLOCK_M)
    compared_end = begin + partly * BLOCK_M
    per_split = tl.cdiv(tl.cdiv(M - begin, BLOCK_M) - unseeing, SPLITS)
    begin += (unseeing + tl.program_id(1) * per_split) * BLOCK_M
    end = tl.minimum(M, begin + per_split * BLOCK_M)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if CAUSAL:
        # only these need the comparison
        middle = tl.minimum(end, tl.maximum(begin, compared_end))
        sums = _add_queries(
            sums, key, n, begin, middle, query_ptr, lse_ptr, weight_ptr, position_ptr, mask_ptr, stride_qm, stride_mm,
            stride_mn, M, N, D, scale, softcap, True, HAS_POSITION, HAS_WEIGHT, HAS_MASK, HAS_SOFTCAP, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        begin = middle
    sums = _add_queries(
        sums, key, n, begin, end, query_ptr, lse_ptr, weight_ptr, position_ptr, mask_ptr, stride_qm, stride_mm,
        stride_mn, M, N, D, scale, softcap, False, HAS_POSITION, HAS_WEIGHT, HAS_MASK, HAS_SOFTCAP, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    place = (row * tl.num_programs(2) + tl.program_id(2)) * HEADS + head
    tl.store(partial_ptr + (place * SPLITS + tl.program_id(1)) * N + n, tl.sum(sums, 0), mask=n < N)


@triton.jit
def _sum_kernel(partial_ptr, start_ptr, scores_ptr, ROWS, PARTS, N, HAS_START: tl.constexpr, BLOCK_N: tl.constexpr):
    """The parts of a KV head, query heads and their splits, in order; 0 for padding. ROWS: weightings x KV heads."""
    block, pid = block_and_row(tl.cdiv(N, BLOCK_N))
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    scored = n < N
    if HAS_START:
        scored = scored & (n >= tl.load(start_ptr + pid // ROWS))
    total = tl.zeros([BLOCK_N], tl.float32)
    for part in range(PARTS):
        total += tl.load(partial_ptr + (pid * PARTS + part) * N + n, mask=scored, other=0.0)
    tl.store(scores_ptr + pid * N + n, total, mask=n < N)


def attention_scores(
    query: Tensor,
    key: Tensor,
    scale: float,
    causal: bool,
    lse: Tensor | None,
    query_weight: Tensor | None,
    key_start: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    query_position: Tensor | None,
    head_scale: Tensor | None,
) -> Tensor:
    """See lookm_kernels.attention_scores."""
    batch, heads, queries, width = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    first = None
    if query_position is not None:
        query_position = query_position.contiguous()
        start = 0 if key_start is None else key_start[:, None]
        first = (query_position < start).sum(1, dtype=torch.int32)
    head_scale = None if head_scale is None else head_scale.float().contiguous()
    mask_strides = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, -1, -1).stride()
    strides = (*query.stride()[:3], *key.stride()[:3], *mask_strides)
    sizes = (heads, heads // kv_heads, queries, tokens, width, scale, softcap or 1.0)
    rows = (key_start, first, query_position, head_scale, mask)
    # fused multiply-adds are spelled out: what a release of Triton fuses by itself would decide the bits
    flags: dict[str, Any] = {
        "CAUSAL": causal,
        "HAS_START": key_start is not None,
        "HAS_POSITION": query_position is not None,
        "HAS_HEAD_SCALE": head_scale is not None,
        "HAS_MASK": mask is not None,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK_D": padded_width(width, query.dtype),
        "enable_fp_fusion": False,
    }
    shape = (*sizes[:4], query_weight is not None, *flags.values())
    if lse is not None:
        lse = lse.contiguous() * _lse.LOG2_E.value
    else:
        lse = query.new_empty((batch, heads, queries), dtype=torch.float32)

        def run_lse(tile: Config) -> None:
            _lse.lse_kernel[(triton.cdiv(queries, tile.rows) * batch * heads,)](
                query, key, lse, *rows, *strides, *sizes, **flags,
                BLOCK_M=tile.rows, BLOCK_N=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

        launch("lse", _lse.CONFIGS, _lse.CANDIDATES, query, shape, run_lse)
    splits = max(1, WANTED_HEADS // heads)
    weightings = () if query_weight is None else query_weight.shape[1:-1]
    partial = query.new_empty((batch, *weightings, heads, splits, tokens), dtype=torch.float32)
    weight = None if query_weight is None else query_weight.float().contiguous()

    def run_scores(tile: Config) -> None:
        grid = triton.cdiv(tokens, tile.columns) * batch * heads, splits, math.prod(weightings)
        _scores_kernel[grid](
            query, key, lse, weight, *rows, partial, *strides, *sizes, **flags,
            HAS_WEIGHT=weight is not None, SPLITS=splits, SCAN=SCAN,
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    launch("scores", CONFIGS, CANDIDATES, query, shape, run_scores)
    scores = query.new_empty((batch, *weightings, kv_heads, tokens), dtype=torch.float32)
    rows_of_one = math.prod(weightings) * kv_heads
    _sum_kernel[(triton.cdiv(tokens, SUM_BLOCK) * batch * rows_of_one,)](
        partial, key_start, scores, rows_of_one, heads // kv_heads * splits, tokens, HAS_START=key_start is not None,
        BLOCK_N=SUM_BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return scores
