"""Log-sum-exp of every query's logits, for attention scores where the prefill attention returned none."""

from __future__ import annotations

import triton
import triton.language as tl

from lookm_kernels.triton._configs import Config, block_and_row

# 1 / ln 2: exponentials and logarithms are base 2, which the hardware has
LOG2_E = tl.constexpr(1.4426950408889634)

# by chip, then bytes of a padded row: queries and keys of a tile
SMALL = {128: Config(128, 64, 8, 3), 256: Config(128, 64, 8, 3), 512: Config(64, 32, 4, 2), 1024: Config(32, 32, 4, 2)}
LARGE = SMALL | {256: Config(128, 128, 8, 2), 512: Config(64, 64, 4, 2)}
CONFIGS = {"sm_80": SMALL, "sm_86": SMALL, "sm_90": LARGE, "sm_100": LARGE, "gfx942": SMALL}
# what LOOKM_AUTOTUNE=1 tries
CANDIDATES = [
    Config(128, 128, 8, 2),
    Config(128, 128, 8, 3),
    Config(128, 64, 8, 3),
    Config(64, 128, 4, 2),
    Config(64, 64, 4, 3),
]


@triton.jit
def base2_logits(product, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """(x, factor): x * factor are the logits of q . k divided by ln 2; tanh(x) = 2 sigmoid(2 x) - 1."""
    if HAS_SOFTCAP:
        return 2 * tl.sigmoid(product * (2 * scale / softcap)) - 1, softcap * LOG2_E
    return product, scale * LOG2_E


@triton.jit
def first_query(start_ptr, first_ptr, row, M, N, HAS_START: tl.constexpr, HAS_POSITION: tl.constexpr):
    """(first token, first query) of a row that is not padding: blocks count from there, so padding changes no bit."""
    start = 0
    if HAS_START:
        start = tl.load(start_ptr + row)
    first = tl.maximum(0, start - (N - M))
    if HAS_POSITION:
        first = tl.load(first_ptr + row)
    return start, first


@triton.jit
def positions(position_ptr, m, M, N, HAS_POSITION: tl.constexpr):
    """Where the queries m of a row stand among the N tokens."""
    if HAS_POSITION:
        return tl.load(position_ptr + m, mask=m < M, other=N)
    return m + (N - M)


@triton.jit
def _see_keys(
    top, total, query, m, position, begin, end, key_ptr, mask_ptr, stride_kn, stride_mm, stride_mn,
    M, N, D, scale, softcap,
    COMPARE: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Running maximum `top` and sum of exponentials `total` [BLOCK_M] over the keys begin to end - 1."""
    d = tl.arange(0, BLOCK_D)
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        place = n[None, :].to(tl.int64) * stride_kn + d[:, None]
        key = tl.load(key_ptr + place, mask=(n < end)[None, :] & (d < D)[:, None], other=0.0)
        x, factor = base2_logits(tl.dot(query, key, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        if COMPARE:
            visible = (n < N)[None, :]
            if CAUSAL:
                visible = visible & (n[None, :] <= position[:, None])
            x = tl.where(visible, x, float("-inf"))
        if HAS_MASK:
            place = m[:, None].to(tl.int64) * stride_mm + n[None, :].to(tl.int64) * stride_mn
            inside = (m < M)[:, None] & (n < N)[None, :]
            x = tl.where(tl.load(mask_ptr + place, mask=inside, other=0) != 0, x, float("-inf"))
        # the factor is positive: the largest x is that of the largest logit
        new_top = tl.maximum(top, tl.max(x, 1) * factor)
        # a query that sees nothing yet has no maximum: 0 keeps its exponentials 0 rather than NaN
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(tl.fma(x, factor, -safe[:, None])), 1)
        top = new_top
    return top, total


@triton.jit
def lse_kernel(
    query_ptr, key_ptr, lse_ptr, start_ptr, first_ptr, position_ptr, head_scale_ptr, mask_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_mb, stride_mh, stride_mm, stride_mn,
    HEADS, GROUP, M, N, D, scale, softcap,
    CAUSAL: tl.constexpr, HAS_START: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_HEAD_SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # the last queries see the most keys: heavy programs first
    block, pid = block_and_row(tl.cdiv(M, BLOCK_M))
    block = tl.cdiv(M, BLOCK_M) - 1 - block
    row, head = pid // HEADS, pid % HEADS
    start, first = first_query(start_ptr, first_ptr, row, M, N, HAS_START, HAS_POSITION)
    first += block * BLOCK_M
    if first >= M:
        return
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    if HAS_POSITION:
        position_ptr += row * M
    position = positions(position_ptr, m, M, N, HAS_POSITION)
    query_ptr += row * stride_qb + head * stride_qh
    key_ptr += row * stride_kb + (head // GROUP) * stride_kh
    place = m[:, None].to(tl.int64) * stride_qm + d[None, :]
    query = tl.load(query_ptr + place, mask=(m < M)[:, None] & (d < D)[None, :], other=0.0)
    if HAS_HEAD_SCALE:
        scale *= tl.load(head_scale_ptr + pid)
    if HAS_MASK:
        mask_ptr += row * stride_mb + head * stride_mh
    # whole blocks of keys that every query of the block sees need no comparison
    end, seen = N, N
    if CAUSAL:
        seen = tl.minimum(N, tl.min(position) + 1)
        end = tl.minimum(N, tl.max(position) + 1)
    middle = start + tl.maximum(0, seen - start) // BLOCK_N * BLOCK_N
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top, total = _see_keys(
        top, total, query, m, position, start, middle, key_ptr, mask_ptr, stride_kn, stride_mm, stride_mn,
        M, N, D, scale, softcap, False, CAUSAL, HAS_MASK, HAS_SOFTCAP, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    top, total = _see_keys(
        top, total, query, m, position, middle, end, key_ptr, mask_ptr, stride_kn, stride_mm, stride_mn,
        M, N, D, scale, softcap, True, CAUSAL, HAS_MASK, HAS_SOFTCAP, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    # infinity for a query that sees nothing; not a number where a logit was none
    lse = tl.where(total == 0, float("inf"), top + tl.log2(total))
    tl.store(lse_ptr + pid * M + m, lse, mask=m < M)
