"""Nearest kept key: a block of evicted tokens walks the kept ones through their indices, with a running maximum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lookm_kernels.triton._configs import Config, block_and_row, configuration, padded_width

# by chip, then bytes of a padded row: evicted and kept tokens of a tile
SMALL = {
    128: Config(128, 64, 8, 3),
    256: Config(128, 64, 8, 3),
    512: Config(64, 32, 4, 2),
    1024: Config(32, 32, 4, 2),
    2048: Config(16, 16, 4, 1),
}
CONFIGS = {"sm_80": SMALL, "sm_86": SMALL, "sm_90": SMALL, "sm_100": SMALL, "gfx942": SMALL}
NORM_ROWS = 64


@triton.jit
def _norm_kernel(
    key_ptr, norm_ptr, stride_kb, stride_kh, stride_kn, HEADS, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    block, pid = block_and_row(tl.cdiv(N, BLOCK_N))
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    place = pid // HEADS * stride_kb + pid % HEADS * stride_kh + n[:, None].to(tl.int64) * stride_kn + d[None, :]
    key = tl.load(key_ptr + place, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(key * key, 1))
    # a key of norm 0 has cosine 0 with every key
    tl.store(norm_ptr + pid * N + n, tl.where(norm > 0, tl.div_rn(1.0, norm), 0.0), mask=n < N)


@triton.jit
def _nearest_kernel(
    key_ptr, norm_ptr, kept_ptr, evicted_ptr, pivot_ptr, similarity_ptr,
    stride_kb, stride_kh, stride_kn, HEADS, N, KEPT, EVICTED, D,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, pid = block_and_row(tl.cdiv(EVICTED, BLOCK_E))
    key_ptr += pid // HEADS * stride_kb + pid % HEADS * stride_kh
    norm_ptr += pid * N
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    evicted = tl.load(evicted_ptr + pid * EVICTED + e, mask=e < EVICTED, other=-1)
    listed = evicted >= 0
    left_place = evicted[:, None].to(tl.int64) * stride_kn + d[None, :]
    left = tl.load(key_ptr + left_place, mask=listed[:, None] & (d < D)[None, :], other=0.0)
    left_norm = tl.load(norm_ptr + evicted, mask=listed, other=0.0)
    best = tl.full([BLOCK_E], float("-inf"), tl.float32)
    pivot = tl.full([BLOCK_E], -1, tl.int32)
    for begin in range(0, KEPT, BLOCK_K):
        c = begin + tl.arange(0, BLOCK_K)
        kept = tl.load(kept_ptr + pid * KEPT + c, mask=c < KEPT, other=-1)
        right_place = kept[None, :].to(tl.int64) * stride_kn + d[:, None]
        right = tl.load(key_ptr + right_place, mask=(kept >= 0)[None, :] & (d < D)[:, None], other=0.0)
        right_norm = tl.load(norm_ptr + kept, mask=kept >= 0, other=0.0)
        cosine = tl.dot(left, right, input_precision="ieee") * left_norm[:, None] * right_norm[None, :]
        # a cosine that is not a number counts as 0
        cosine = tl.where(tl.abs(cosine) < float("inf"), cosine, 0.0)
        cosine = tl.where((kept >= 0)[None, :], cosine, float("-inf"))
        block_best, block_place = tl.max(cosine, 1, return_indices=True, return_indices_tie_break_left=True)
        better = block_best > best
        pivot = tl.where(better, begin + block_place, pivot)
        best = tl.where(better, block_best, best)
    merges = listed & (pivot >= 0)
    tl.store(pivot_ptr + pid * EVICTED + e, tl.where(merges, pivot, -1), mask=e < EVICTED)
    tl.store(similarity_ptr + pid * EVICTED + e, tl.where(merges, best, 0.0), mask=e < EVICTED)


def nearest_kept(key: Tensor, kept: Tensor, evicted: Tensor) -> tuple[Tensor, Tensor]:
    """See lookm_kernels.nearest_kept."""
    batch, heads, tokens, width = key.shape
    pivot = torch.empty_like(evicted, memory_format=torch.contiguous_format)
    similarity = torch.empty_like(pivot, dtype=torch.float32)
    if evicted.shape[2] == 0:
        return pivot, similarity
    norm = key.new_empty((batch, heads, tokens), dtype=torch.float32)
    strides, block_d = key.stride()[:3], padded_width(width)
    _norm_kernel[(triton.cdiv(tokens, NORM_ROWS) * batch * heads,)](
        key, norm, *strides, heads, tokens, width, BLOCK_N=NORM_ROWS, BLOCK_D=block_d, num_warps=4
    )
    config = configuration(CONFIGS, width, key)
    _nearest_kernel[(triton.cdiv(evicted.shape[2], config.rows) * batch * heads,)](
        key, norm, kept.contiguous(), evicted.contiguous(), pivot, similarity, *strides, heads, tokens, kept.shape[2],
        evicted.shape[2], width, BLOCK_E=config.rows, BLOCK_K=config.columns, BLOCK_D=block_d, num_warps=config.warps,
        num_stages=config.stages,
    )  # fmt: skip
    return pivot, similarity
