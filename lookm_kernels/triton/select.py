"""Radix selection on (tier, score), then an ordered compaction by prefix sums: one program a (row, head)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lookm_kernels._lists import empty_lists

BLOCK_N = 4096
WARPS = 8


@triton.jit
def _order_key(score):
    """uint32 that orders as the score does; 0, below every finite score, for NaN and infinities; -0 as 0."""
    finite = tl.abs(score) < float("inf")
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    return tl.where(finite, ordered, 0).to(tl.uint32, bitcast=True)


@triton.jit
def _select_kernel(
    scores_ptr, tier_ptr, keep_ptr, kept_ptr, evicted_ptr, HEADS, N, KEEP, KEPT, EVICTED,
    HAS_KEEPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    scores_ptr += pid * N
    tier_ptr += pid // HEADS * N
    kept_ptr += pid * KEPT
    evicted_ptr += pid * EVICTED
    lane = tl.arange(0, BLOCK_N)

    protected, text, image = 0, 0, 0
    for begin in range(0, N, BLOCK_N):
        tier = tl.load(tier_ptr + begin + lane, mask=begin + lane < N, other=0)
        protected += tl.sum((tier == 3).to(tl.int32))
        text += tl.sum((tier == 2).to(tl.int32))
        image += tl.sum((tier == 1).to(tl.int32))
    valid = protected + text + image
    keep = KEEP
    if HAS_KEEPS:
        keep = tl.load(keep_ptr + pid // HEADS)
    keep = tl.minimum(keep, valid)
    # the tier in which the line between kept and evicted falls, and how many of it stay
    boundary = tl.where(keep <= protected, 3, tl.where(keep <= protected + text, 2, 1))
    wanted = keep - tl.where(boundary < 3, protected, 0) - tl.where(boundary < 2, text, 0)

    digit = tl.arange(0, 256)
    line = tl.zeros([], tl.uint32)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for begin in range(0, N, BLOCK_N):
            inside = begin + lane < N
            order = _order_key(tl.load(scores_ptr + begin + lane, mask=inside, other=0.0))
            candidate = tl.load(tier_ptr + begin + lane, mask=inside, other=0) == boundary
            if step > 0:
                candidate = candidate & ((order >> (shift + 8)) == (line >> (shift + 8)))
            counts += tl.histogram(((order >> shift) & 255).to(tl.int32), 256, mask=candidate)
        at_least = tl.sum(counts) - tl.cumsum(counts) + counts
        chosen = tl.max(tl.where(at_least >= wanted, digit, 0))
        wanted -= tl.sum(tl.where(digit == chosen, at_least - counts, 0))
        line = line | (chosen.to(tl.uint32) << shift)

    kept_end, evicted_end = KEPT - keep, EVICTED - (valid - keep)
    for begin in range(0, kept_end, BLOCK_N):
        tl.store(kept_ptr + begin + lane, -1, mask=begin + lane < kept_end)
    for begin in range(0, evicted_end, BLOCK_N):
        tl.store(evicted_ptr + begin + lane, -1, mask=begin + lane < evicted_end)
    ties = 0
    for begin in range(0, N, BLOCK_N):
        n = begin + lane
        order = _order_key(tl.load(scores_ptr + n, mask=n < N, other=0.0))
        tier = tl.load(tier_ptr + n, mask=n < N, other=0)
        tie = ((tier == boundary) & (order == line)).to(tl.int32)
        # of equal scores the lower index stays
        stays = (tie == 1) & (ties + tl.cumsum(tie) - tie < wanted)
        stays = (tier > 0) & (stays | (tier > boundary) | ((tier == boundary) & (order > line)))
        leaves = (tier > 0) & ~stays
        # both counts in one prefix sum, 16 bits each
        count = stays.to(tl.int32) + (leaves.to(tl.int32) << 16)
        before = tl.cumsum(count) - count
        tl.store(kept_ptr + kept_end + (before & 0xFFFF), n, mask=stays)
        tl.store(evicted_ptr + evicted_end + (before >> 16), n, mask=leaves)
        total = tl.sum(count)
        kept_end += total & 0xFFFF
        evicted_end += total >> 16
        ties += tl.sum(tie)


def select_tokens(scores: Tensor, tier: Tensor, keep: list[int]) -> tuple[Tensor, Tensor]:
    """See lookm_kernels.select_tokens."""
    batch, heads, tokens = scores.shape
    kept, evicted, keeps = empty_lists(scores, keep)
    _select_kernel[(batch * heads,)](
        scores.contiguous(), tier.contiguous(), keeps, kept, evicted, heads, tokens, keep[0], kept.shape[2],
        evicted.shape[2], HAS_KEEPS=keeps is not None, BLOCK_N=BLOCK_N, num_warps=WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
    return kept, evicted
