"""Nearest kept key: a block of evicted tokens walks the kept ones through their indices, with a running maximum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lookm_kernels.triton._configs import Config, block_and_row, launch, padded_width

# by chip, then bytes of a padded row: evicted and kept tokens of a tile
SMALL = {128: Config(128, 64, 8, 3), 256: Config(128, 64, 8, 3), 512: Config(64, 32, 4, 2), 1024: Config(32, 32, 4, 2)}
HOPPER = SMALL | {128: Config(64, 128, 4, 2), 256: Config(64, 128, 4, 2)}
CONFIGS = {"sm_80": SMALL, "sm_86": SMALL, "sm_90": HOPPER, "sm_100": SMALL, "gfx942": SMALL}
# what LOOKM_AUTOTUNE=1 tries
CANDIDATES = [
    Config(128, 64, 8, 2),
    Config(128, 64, 8, 3),
    Config(128, 64, 4, 3),
    Config(64, 128, 4, 2),
    Config(64, 64, 4, 3),
]
NORM_ROWS = 64


@triton.jit
def _norm_kernel(
    key_ptr, inverse_ptr, stride_kb, stride_kh, stride_kn, HEADS, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    block, pid = block_and_row(tl.cdiv(N, BLOCK_N))
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    place = pid // HEADS * stride_kb + pid % HEADS * stride_kh + n[:, None].to(tl.int64) * stride_kn + d[None, :]
    key = tl.load(key_ptr + place, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(key * key, 1))
    # a key of norm 0, or of none that is a number, has cosine 0 with every key
    inverse = tl.where((norm > 0) & (norm < float("inf")), tl.div_rn(1.0, norm), 0.0)
    tl.store(inverse_ptr + pid * N + n, inverse, mask=n < N)


@triton.jit
def _nearest_kernel(
    key_ptr, inverse_ptr, kept_ptr, evicted_ptr, pivot_ptr, similarity_ptr,
    stride_kb, stride_kh, stride_kn, HEADS, N, KEPT, EVICTED, D,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, pid = block_and_row(tl.cdiv(EVICTED, BLOCK_E))
    key_ptr += pid // HEADS * stride_kb + pid % HEADS * stride_kh
    inverse_ptr += pid * N
    kept_ptr += pid * KEPT
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    lane = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    evicted = tl.load(evicted_ptr + pid * EVICTED + e, mask=e < EVICTED, other=-1)
    inverse = tl.load(inverse_ptr + evicted, mask=evicted >= 0, other=0.0)
    left_place = evicted[:, None].to(tl.int64) * stride_kn + d[None, :]
    left = tl.load(key_ptr + left_place, mask=(inverse != 0)[:, None] & (d < D)[None, :], other=0.0)
    best = tl.full([BLOCK_E], float("-inf"), tl.float32)
    pivot = tl.full([BLOCK_E], -1, tl.int32)
    for begin in range(0, KEPT, BLOCK_K):
        kept = tl.load(kept_ptr + begin + lane, mask=begin + lane < KEPT, other=-1)
        kept_inverse = tl.load(inverse_ptr + kept, mask=kept >= 0, other=0.0)
        right_place = kept[None, :].to(tl.int64) * stride_kn + d[:, None]
        right = tl.load(key_ptr + right_place, mask=(kept_inverse != 0)[None, :] & (d < D)[:, None], other=0.0)
        product = tl.dot(left, right, input_precision="ieee")
        # minus infinity: an empty place is no pivot
        cosine = tl.fma(product, kept_inverse[None, :], tl.where(kept >= 0, 0.0, float("-inf"))[None, :])
        block_best, block_place = tl.max(cosine, 1, return_indices=True, return_indices_tie_break_left=True)
        better = block_best > best
        pivot = tl.where(better, begin + block_place, pivot)
        best = tl.where(better, block_best, best)
    merges = (evicted >= 0) & (pivot >= 0)
    tl.store(pivot_ptr + pid * EVICTED + e, tl.where(merges, pivot, -1), mask=e < EVICTED)
    tl.store(similarity_ptr + pid * EVICTED + e, tl.where(merges, best * inverse, 0.0), mask=e < EVICTED)


def nearest_kept(
    key: Tensor,
    kept: Tensor,
    evicted: Tensor,
    value: Tensor | None = None,
    group: Tensor | None = None,
    min_similarity: Tensor | None = None,
    kept_key: Tensor | None = None,
    kept_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See lookm_kernels.nearest_kept."""
    batch, heads, tokens, width = key.shape
    pivot = torch.empty_like(evicted, memory_format=torch.contiguous_format)
    similarity = torch.empty_like(pivot, dtype=torch.float32)
    if evicted.shape[2] == 0:
        return pivot, similarity
    inverse = key.new_empty((batch, heads, tokens), dtype=torch.float32)
    strides, block_d = key.stride()[:3], padded_width(width, key.dtype)
    _norm_kernel[(triton.cdiv(tokens, NORM_ROWS) * batch * heads,)](
        key, inverse, *strides, heads, tokens, width, BLOCK_N=NORM_ROWS, BLOCK_D=block_d, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    kept, evicted = kept.contiguous(), evicted.contiguous()
    sizes = (heads, tokens, kept.shape[2], evicted.shape[2], width)

    def run(tile: Config) -> None:
        _nearest_kernel[(triton.cdiv(evicted.shape[2], tile.rows) * batch * heads,)](
            key, inverse, kept, evicted, pivot, similarity, *strides, *sizes, enable_fp_fusion=False,
            BLOCK_E=tile.rows, BLOCK_K=tile.columns, BLOCK_D=block_d, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    launch("nearest", CONFIGS, CANDIDATES, key, sizes, run)
    return pivot, similarity
