"""Compaction in place: a program walks one (row, head) and a slab of the head dimension, without a second buffer.

Kept indices ascend, so the places that move right (more empty places than tokens skipped) come first and are walked
backwards, those that move left come after and are walked forwards: no row is overwritten before it was read.

Into other memory nothing is in the way: every block of places has a program of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lookm_kernels.triton._configs import block_and_row

BLOCK_K = 128
SLAB_BYTES = 64
# of one warp the loads are done before the stores; on AMD a barrier between warps waits for no load from memory
WARPS = 1
# no load may move before an earlier store
STAGES = 1


@triton.jit
def _move(x_ptr, stride_n, out_ptr, stride_on, kept_ptr, begin, low, high, d, D, BLOCK_K: tl.constexpr):
    """Places begin to begin + BLOCK_K - 1, those inside [low, high): all are read before any is written."""
    c = begin + tl.arange(0, BLOCK_K)
    inside = (c >= low) & (c < high)
    token = tl.load(kept_ptr + c, mask=inside, other=0).to(tl.int64)
    mask = inside[:, None] & (d < D)[None, :]
    rows = tl.load(x_ptr + token[:, None] * stride_n + d[None, :], mask=mask & (token >= 0)[:, None], other=0.0)
    tl.debug_barrier()
    tl.store(out_ptr + c[:, None].to(tl.int64) * stride_on + d[None, :], rows, mask=mask)


@triton.jit
def _walk(x_ptr, stride_n, kept_ptr, KEPT, d, D, BLOCK_K: tl.constexpr):
    """All places of one (row, head), in place."""
    empty, right = 0, 0
    for begin in range(0, KEPT, BLOCK_K):
        c = begin + tl.arange(0, BLOCK_K)
        token = tl.load(kept_ptr + c, mask=c < KEPT, other=0)
        empty += tl.sum(((token < 0) & (c < KEPT)).to(tl.int32))
        right += tl.sum(((token >= 0) & (token < c) & (c < KEPT)).to(tl.int32))
    middle = empty + right
    for step in range(tl.cdiv(right, BLOCK_K)):
        begin = middle - (step + 1) * BLOCK_K
        _move(x_ptr, stride_n, x_ptr, stride_n, kept_ptr, begin, empty, middle, d, D, BLOCK_K)
    for begin in range(middle, KEPT, BLOCK_K):
        _move(x_ptr, stride_n, x_ptr, stride_n, kept_ptr, begin, middle, KEPT, d, D, BLOCK_K)
    for begin in range(0, empty, BLOCK_K):
        _move(x_ptr, stride_n, x_ptr, stride_n, kept_ptr, begin, 0, empty, d, D, BLOCK_K)


@triton.jit
def _compact_kernel(
    x_ptr, out_ptr, kept_ptr, stride_b, stride_h, stride_n, stride_ob, stride_oh, stride_on, HEADS, KEPT, D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    slabs = tl.cdiv(D, BLOCK_D)
    part, pid = block_and_row(slabs if IN_PLACE else slabs * tl.cdiv(KEPT, BLOCK_K))
    x_ptr += pid // HEADS * stride_b + pid % HEADS * stride_h
    kept_ptr += pid * KEPT
    d = part % slabs * BLOCK_D + tl.arange(0, BLOCK_D)
    if IN_PLACE:
        _walk(x_ptr, stride_n, kept_ptr, KEPT, d, D, BLOCK_K)
    else:
        out_ptr += pid // HEADS * stride_ob + pid % HEADS * stride_oh
        begin = part // slabs * BLOCK_K
        _move(x_ptr, stride_n, out_ptr, stride_on, kept_ptr, begin, 0, KEPT, d, D, BLOCK_K)


def compact_(
    key: Tensor, value: Tensor, kept: Tensor, out_key: Tensor | None = None, out_value: Tensor | None = None
) -> None:
    """See lookm_kernels.compact_."""
    batch, heads, kept_size = kept.shape
    if kept_size == 0:
        return
    kept = kept.contiguous()
    for tensor, into in ((key, out_key), (value, out_value)):
        out, walks = (tensor, 1) if into is None else (into, triton.cdiv(kept_size, BLOCK_K))
        width = tensor.shape[3]
        slab = SLAB_BYTES // tensor.element_size()
        _compact_kernel[(triton.cdiv(width, slab) * walks * batch * heads,)](
            tensor, out, kept, *tensor.stride()[:3], *out.stride()[:3], heads, kept_size, width, BLOCK_K=BLOCK_K,
            BLOCK_D=slab, IN_PLACE=into is None, num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=False,
        )  # fmt: skip
