"""Column sums of the attention matrix: a log-sum-exp pass where it is not given, then one key-stationary pass.

A program owns a block of keys of one query head and walks the queries that see it: every sum has one writer and a fixed
order. Blocks count from the row's first token that is not padding: padding changes no bit. Exponentials and logarithms
are base 2 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lookm_kernels.triton._configs import Config, block_and_row, padded_width, row_bytes

LOG2_E = tl.constexpr(1.4426950408889634)

# by bytes of a padded row: queries and keys of a tile
LSE_CONFIGS = {
    128: Config(128, 64, 8, 3),
    256: Config(128, 64, 8, 3),
    512: Config(64, 32, 4, 2),
    1024: Config(32, 32, 4, 2),
    2048: Config(16, 16, 4, 1),
}
SCORES_CONFIGS = {
    128: Config(64, 128, 8, 3),
    256: Config(64, 128, 8, 3),
    512: Config(32, 64, 8, 2),
    1024: Config(32, 32, 4, 2),
    2048: Config(16, 16, 4, 1),
}
# few heads make few programs, which then share a block's queries; by the heads alone, so that the batch changes no bit
WANTED_HEADS = 16
SUM_BLOCK = 1024


@triton.jit
def _logits(product, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Base-2 logits of q . k; tanh(x) = 2 sigmoid(2 x) - 1."""
    logits = product * scale
    if HAS_SOFTCAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
    return logits * LOG2_E


@triton.jit
def _lse_kernel(
    query_ptr, key_ptr, lse_ptr, start_ptr, mask_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_mb, stride_mh, stride_mm, stride_mn,
    HEADS, GROUP, M, N, D, scale, softcap,
    CAUSAL: tl.constexpr, HAS_START: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # the last queries see the most keys: heavy programs first
    block, pid = block_and_row(tl.cdiv(M, BLOCK_M))
    block = tl.cdiv(M, BLOCK_M) - 1 - block
    row, head = pid // HEADS, pid % HEADS
    start = 0
    if HAS_START:
        start = tl.load(start_ptr + row)
    begin_query = tl.maximum(0, start - (N - M)) + block * BLOCK_M
    m = begin_query + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query_ptr += row * stride_qb + head * stride_qh
    key_ptr += row * stride_kb + (head // GROUP) * stride_kh
    query_place = m[:, None].to(tl.int64) * stride_qm + d[None, :]
    query = tl.load(query_ptr + query_place, mask=(m < M)[:, None] & (d < D)[None, :], other=0.0)
    if HAS_MASK:
        mask_ptr += row * stride_mb + head * stride_mh
    end = N
    if CAUSAL:
        end = tl.minimum(N, begin_query + BLOCK_M + N - M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(start, end, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        key_place = n[None, :].to(tl.int64) * stride_kn + d[:, None]
        key = tl.load(key_ptr + key_place, mask=(n < N)[None, :] & (d < D)[:, None], other=0.0)
        logits = _logits(tl.dot(query, key, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        visible = (n < N)[None, :]
        if CAUSAL:
            visible = visible & (n[None, :] <= m[:, None] + N - M)
        if HAS_MASK:
            place = m[:, None].to(tl.int64) * stride_mm + n[None, :].to(tl.int64) * stride_mn
            inside = (m < M)[:, None] & (n < N)[None, :]
            visible = visible & (tl.load(mask_ptr + place, mask=inside, other=0) != 0)
        logits = tl.where(visible, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # a query that sees nothing yet has no maximum: 0 keeps its exponentials 0 rather than NaN
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
        top = new_top
    # infinity for a query that sees nothing; not a number where a logit was none
    lse = tl.where(total == 0, float("inf"), top + tl.log2(total))
    tl.store(lse_ptr + pid * M + m, lse, mask=m < M)


@triton.jit
def _add_queries(
    sums, key, n, begin, end, query_ptr, lse_ptr, weight_ptr, mask_ptr, stride_qm, stride_mm, stride_mn,
    M, N, D, scale, softcap,
    CAUSAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the attention that queries begin to end - 1 pay to the keys n: sums [BLOCK_N, BLOCK_M] float32."""
    d = tl.arange(0, BLOCK_D)
    for first in range(begin, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        used = m < end
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + m, mask=used, other=0.0)
            used = weight != 0
        place = m[None, :].to(tl.int64) * stride_qm + d[:, None]
        query = tl.load(query_ptr + place, mask=used[None, :] & (d < D)[:, None], other=0.0)
        # infinity leaves a query out: its exponentials are 0
        lse = tl.load(lse_ptr + m, mask=used, other=float("inf"))
        logits = _logits(tl.dot(key, query, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        attention = tl.exp2(logits - lse[None, :])
        if HAS_WEIGHT:
            attention *= weight[None, :]
        if CAUSAL:
            attention = tl.where(n[:, None] <= m[None, :] + N - M, attention, 0.0)
        if HAS_MASK:
            place = m[None, :].to(tl.int64) * stride_mm + n[:, None].to(tl.int64) * stride_mn
            seen = tl.load(mask_ptr + place, mask=used[None, :] & (n < N)[:, None], other=0) != 0
            attention = tl.where(seen, attention, 0.0)
        sums += attention
    return sums


@triton.jit
def _scores_kernel(
    query_ptr, key_ptr, lse_ptr, weight_ptr, start_ptr, mask_ptr, partial_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_mb, stride_mh, stride_mm, stride_mn,
    HEADS, GROUP, M, N, D, scale, softcap,
    CAUSAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_START: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # under a causal mask the first keys are seen by the most queries: heavy programs first
    block, pid = block_and_row(tl.cdiv(N, BLOCK_N))
    row, head = pid // HEADS, pid % HEADS
    start = 0
    if HAS_START:
        start = tl.load(start_ptr + row)
    begin_key = start + block * BLOCK_N
    n = begin_key + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    key_ptr += row * stride_kb + (head // GROUP) * stride_kh
    place = n[:, None].to(tl.int64) * stride_kn + d[None, :]
    key = tl.load(key_ptr + place, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
    query_ptr += row * stride_qb + head * stride_qh
    lse_ptr += pid * M
    if HAS_WEIGHT:
        weight_ptr += row * M
    if HAS_MASK:
        mask_ptr += row * stride_mb + head * stride_mh
    begin = tl.maximum(0, start - (N - M))
    # blocks of queries before the first that sees a key of the block, and before the first that sees them all
    unseeing, partly = 0, 0
    if CAUSAL:
        unseeing = tl.maximum(0, begin_key - (N - M) - begin) // BLOCK_M
        partly = tl.cdiv(tl.maximum(0, begin_key + BLOCK_N - 1 - (N - M) - begin), BLOCK_M)
    diagonal_end = begin + partly * BLOCK_M
    per_split = tl.cdiv(tl.cdiv(M - begin, BLOCK_M) - unseeing, SPLITS)
    begin += (unseeing + tl.program_id(1) * per_split) * BLOCK_M
    end = tl.minimum(M, begin + per_split * BLOCK_M)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if CAUSAL:
        # only these need the comparison
        middle = tl.minimum(end, tl.maximum(begin, diagonal_end))
        sums = _add_queries(
            sums, key, n, begin, middle, query_ptr, lse_ptr, weight_ptr, mask_ptr, stride_qm, stride_mm, stride_mn,
            M, N, D, scale, softcap, True, HAS_WEIGHT, HAS_MASK, HAS_SOFTCAP, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        begin = middle
    sums = _add_queries(
        sums, key, n, begin, end, query_ptr, lse_ptr, weight_ptr, mask_ptr, stride_qm, stride_mm, stride_mn,
        M, N, D, scale, softcap, False, HAS_WEIGHT, HAS_MASK, HAS_SOFTCAP, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    tl.store(partial_ptr + (pid * SPLITS + tl.program_id(1)) * N + n, tl.sum(sums, 1), mask=n < N)


@triton.jit
def _sum_kernel(partial_ptr, start_ptr, scores_ptr, KV_HEADS, PARTS, N, HAS_START: tl.constexpr, BLOCK_N: tl.constexpr):
    """The parts of a KV head, its query heads and their splits, in order; 0 for padding."""
    block, pid = block_and_row(tl.cdiv(N, BLOCK_N))
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    scored = n < N
    if HAS_START:
        scored = scored & (n >= tl.load(start_ptr + pid // KV_HEADS))
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
) -> Tensor:
    """See lookm_kernels.attention_scores."""
    batch, heads, queries, width = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    mask_strides = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, -1, -1).stride()
    strides = (*query.stride()[:3], *key.stride()[:3], *mask_strides)
    sizes = (heads, heads // kv_heads, queries, tokens, width, scale, softcap or 1.0)
    flags = {
        "CAUSAL": causal,
        "HAS_START": key_start is not None,
        "HAS_MASK": mask is not None,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK_D": padded_width(width),
    }
    key_bytes = row_bytes(width, query.dtype)
    if lse is not None:
        lse = lse.contiguous() * LOG2_E.value
    else:
        lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
        config = LSE_CONFIGS[key_bytes]
        _lse_kernel[(triton.cdiv(queries, config.rows) * batch * heads,)](
            query, key, lse, key_start, mask, *strides, *sizes, **flags,
            BLOCK_M=config.rows, BLOCK_N=config.columns, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    config = SCORES_CONFIGS[key_bytes]
    splits = max(1, WANTED_HEADS // heads)
    partial = query.new_empty((batch, heads, splits, tokens), dtype=torch.float32)
    weight = None if query_weight is None else query_weight.float().contiguous()
    _scores_kernel[(triton.cdiv(tokens, config.columns) * batch * heads, splits)](
        query, key, lse, weight, key_start, mask, partial, *strides, *sizes, **flags,
        HAS_WEIGHT=weight is not None, SPLITS=splits,
        BLOCK_M=config.rows, BLOCK_N=config.columns, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    scores = query.new_empty((batch, kv_heads, tokens), dtype=torch.float32)
    _sum_kernel[(triton.cdiv(tokens, SUM_BLOCK) * batch * kv_heads,)](
        partial, key_start, scores, kv_heads, heads // kv_heads * splits, tokens, HAS_START=key_start is not None,
        BLOCK_N=SUM_BLOCK, num_warps=4,
    )  # fmt: skip
    return scores
