"""Compaction in place: a program walks one (row, head) and a slab of the head dimension, without a second buffer.

Kept indices ascend, so the places that move right (more empty places than tokens skipped) come first and are walked
backwards, those that move left come after and are walked forwards: no row is overwritten before it was read.
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
def _move(x_ptr, kept_ptr, begin, low, high, stride_n, d, D, BLOCK_K: tl.constexpr):
    """Places begin to begin + BLOCK_K - 1, those inside [low, high): all are read before any is written."""
    c = begin + tl.arange(0, BLOCK_K)
    inside = (c >= low) & (c < high)
    token = tl.load(kept_ptr + c, mask=inside, other=0).to(tl.int64)
    mask = inside[:, None] & (d < D)[None, :]
    rows = tl.load(x_ptr + token[:, None] * stride_n + d[None, :], mask=mask & (token >= 0)[:, None], other=0.0)
    tl.debug_barrier()
    tl.store(x_ptr + c[:, None].to(tl.int64) * stride_n + d[None, :], rows, mask=mask)


@triton.jit
def _compact_kernel(
    x_ptr, kept_ptr, stride_b, stride_h, stride_n, HEADS, KEPT, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    slab, pid = block_and_row(tl.cdiv(D, BLOCK_D))
    x_ptr += pid // HEADS * stride_b + pid % HEADS * stride_h
    kept_ptr += pid * KEPT
    d = slab * BLOCK_D + tl.arange(0, BLOCK_D)
    empty, right = 0, 0
    for begin in range(0, KEPT, BLOCK_K):
        c = begin + tl.arange(0, BLOCK_K)
        token = tl.load(kept_ptr + c, mask=c < KEPT, other=0)
        empty += tl.sum(((token < 0) & (c < KEPT)).to(tl.int32))
        right += tl.sum(((token >= 0) & (token < c) & (c < KEPT)).to(tl.int32))
    middle = empty + right
    for step in range(tl.cdiv(right, BLOCK_K)):
        _move(x_ptr, kept_ptr, middle - (step + 1) * BLOCK_K, empty, middle, stride_n, d, D, BLOCK_K)
    for begin in range(middle, KEPT, BLOCK_K):
        _move(x_ptr, kept_ptr, begin, middle, KEPT, stride_n, d, D, BLOCK_K)
    for begin in range(0, empty, BLOCK_K):
        _move(x_ptr, kept_ptr, begin, 0, empty, stride_n, d, D, BLOCK_K)


def compact_(key: Tensor, value: Tensor, kept: Tensor) -> None:
    """See lookm_kernels.compact_."""
    batch, heads, kept_size = kept.shape
    kept = kept.contiguous()
    for tensor in (key, value):
        width = tensor.shape[3]
        slab = SLAB_BYTES // tensor.element_size()
        _compact_kernel[(triton.cdiv(width, slab) * batch * heads,)](
            tensor, kept, *tensor.stride()[:3], heads, kept_size, width, BLOCK_K=BLOCK_K, BLOCK_D=slab,
            num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=False,
        )  # fmt: skip
