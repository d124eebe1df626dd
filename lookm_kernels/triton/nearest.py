"""Nearest kept key: a block of evicted tokens walks the kept ones through their indices, with a running maximum.

Where what was merged in an earlier round is compared with, the kept ones lie in rows of their own.
"""

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
# keys and values of a tile at once
BOTH = {128: Config(64, 32, 4, 2), 256: Config(64, 32, 4, 2), 512: Config(32, 32, 4, 1), 1024: Config(16, 16, 8, 1)}
BOTH_FLOAT32 = {
    128: Config(32, 32, 4, 1),
    256: Config(32, 32, 4, 1),
    512: Config(16, 32, 4, 1),
    1024: Config(16, 16, 8, 1),
    2048: Config(16, 16, 8, 1),
}
GROUP_CONFIGS = dict.fromkeys(CONFIGS, BOTH)
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
def _better(best, pivot, cosine, begin):
    """The best similarities so far and their places, after those [E, K] of the kept rows from `begin` on."""
    block_best, block_place = tl.max(cosine, 1, return_indices=True, return_indices_tie_break_left=True)
    better = block_best > best
    return tl.where(better, block_best, best), tl.where(better, begin + block_place, pivot)


@triton.jit
def _rows(x_ptr, stride_n, row, inverse, D, BLOCK_D: tl.constexpr):
    """Rows [any, BLOCK_D] of x, zeros where the inverse of the norm is 0."""
    d = tl.arange(0, BLOCK_D)
    place = row[:, None].to(tl.int64) * stride_n + d[None, :]
    return tl.load(x_ptr + place, mask=(inverse != 0)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _nearest_of_group_kernel(
    key_ptr, value_ptr, kept_key_ptr, kept_value_ptr, inverse_ptr, value_inverse_ptr, kept_inverse_ptr,
    kept_value_inverse_ptr, kept_ptr, evicted_ptr, group_ptr, pivot_ptr, similarity_ptr,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_pb, stride_ph, stride_pn, stride_qb,
    stride_qh, stride_qn, HEADS, N, KEPT, EVICTED, DK, DV, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_VALUE: tl.constexpr, HAS_GROUP: tl.constexpr,
    OWN_ROWS: tl.constexpr,
):  # fmt: skip
    # OWN_ROWS: kept rows and their norms lie at places of the list, else at tokens
    block, pid = block_and_row(tl.cdiv(EVICTED, BLOCK_E))
    b, h = pid // HEADS, pid % HEADS
    right_size = KEPT if OWN_ROWS else N
    kept_ptr += pid * KEPT
    key_ptr += b * stride_kb + h * stride_kh
    kept_key_ptr += b * stride_pb + h * stride_ph
    inverse_ptr += pid * N
    kept_inverse_ptr += pid * right_size
    if HAS_VALUE:
        value_ptr += b * stride_vb + h * stride_vh
        kept_value_ptr += b * stride_qb + h * stride_qh
        value_inverse_ptr += pid * N
        kept_value_inverse_ptr += pid * right_size
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    lane = tl.arange(0, BLOCK_K)
    evicted = tl.load(evicted_ptr + pid * EVICTED + e, mask=e < EVICTED, other=-1)
    inverse = tl.load(inverse_ptr + evicted, mask=evicted >= 0, other=0.0)
    left = _rows(key_ptr, stride_kn, evicted, inverse, DK, BLOCK_DK)
    if HAS_VALUE:
        value_inverse = tl.load(value_inverse_ptr + evicted, mask=evicted >= 0, other=0.0)
        left_value = _rows(value_ptr, stride_vn, evicted, value_inverse, DV, BLOCK_DV)
    if HAS_GROUP:
        group_ptr += b * N
        group = tl.load(group_ptr + evicted, mask=evicted >= 0, other=0)
    best = tl.full([BLOCK_E], float("-inf"), tl.float32)
    pivot = tl.full([BLOCK_E], -1, tl.int32)
    for begin in range(0, KEPT, BLOCK_K):
        place = begin + lane
        kept = tl.load(kept_ptr + place, mask=place < KEPT, other=-1)
        row = place if OWN_ROWS else kept
        kept_inverse = tl.load(kept_inverse_ptr + row, mask=kept >= 0, other=0.0)
        right = _rows(kept_key_ptr, stride_pn, row, kept_inverse, DK, BLOCK_DK)
        product = tl.dot(left, tl.trans(right), input_precision="ieee")
        cosine = product * inverse[:, None] * kept_inverse[None, :]
        if HAS_VALUE:
            kept_value_inverse = tl.load(kept_value_inverse_ptr + row, mask=kept >= 0, other=0.0)
            right_value = _rows(kept_value_ptr, stride_qn, row, kept_value_inverse, DV, BLOCK_DV)
            product = tl.dot(left_value, tl.trans(right_value), input_precision="ieee")
            cosine = (cosine + product * value_inverse[:, None] * kept_value_inverse[None, :]) * 0.5
        # minus infinity: an empty place is no pivot, nor is one of another group
        may = (kept >= 0)[None, :]
        if HAS_GROUP:
            may = may & (tl.load(group_ptr + kept, mask=kept >= 0, other=0)[None, :] == group[:, None])
        cosine = tl.where(may, cosine, float("-inf"))
        best, pivot = _better(best, pivot, cosine, begin)
    merges = (evicted >= 0) & (pivot >= 0)
    tl.store(pivot_ptr + pid * EVICTED + e, tl.where(merges, pivot, -1), mask=e < EVICTED)
    tl.store(similarity_ptr + pid * EVICTED + e, tl.where(merges, best, 0.0), mask=e < EVICTED)


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
        best, pivot = _better(best, pivot, cosine, begin)
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
    pivot = torch.empty_like(evicted, memory_format=torch.contiguous_format)
    similarity = torch.empty_like(pivot, dtype=torch.float32)
    if evicted.shape[2] == 0:
        return pivot, similarity
    kept, evicted = kept.contiguous(), evicted.contiguous()
    if value is None and group is None and kept_key is None:
        _nearest_of_all(key, kept, evicted, pivot, similarity)
    else:
        _nearest_of_group(key, kept, evicted, value, group, kept_key, kept_value, pivot, similarity)
    if min_similarity is not None:
        too_far = similarity < min_similarity[..., None]
        pivot.masked_fill_(too_far, -1)
        similarity.masked_fill_(too_far, 0.0)
    return pivot, similarity


def _inverse_norms(rows: Tensor) -> Tensor:
    """[B, H, N] float32 of rows [B, H, N, D]; 0 for a norm of 0, or of none that is a number."""
    batch, heads, tokens, width = rows.shape
    inverse = rows.new_empty((batch, heads, tokens), dtype=torch.float32)
    if tokens:
        _norm_kernel[(triton.cdiv(tokens, NORM_ROWS) * batch * heads,)](
            rows, inverse, *rows.stride()[:3], heads, tokens, width, BLOCK_N=NORM_ROWS,
            BLOCK_D=padded_width(width, rows.dtype), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return inverse


def _kept_rows(rows: Tensor, kept: Tensor) -> Tensor:
    """[B, H, K, D]: rows [B, H, N, D] of the tokens in kept [B, H, K]; any for an empty place."""
    return rows.gather(2, kept.clamp(min=0).long()[..., None].expand(-1, -1, -1, rows.shape[3]))


def _nearest_of_all(key: Tensor, kept: Tensor, evicted: Tensor, pivot: Tensor, similarity: Tensor) -> None:
    batch, heads, tokens, width = key.shape
    inverse, strides, block_d = _inverse_norms(key), key.stride()[:3], padded_width(width, key.dtype)
    sizes = (heads, tokens, kept.shape[2], evicted.shape[2], width)

    def run(tile: Config) -> None:
        _nearest_kernel[(triton.cdiv(evicted.shape[2], tile.rows) * batch * heads,)](
            key, inverse, kept, evicted, pivot, similarity, *strides, *sizes, enable_fp_fusion=False,
            BLOCK_E=tile.rows, BLOCK_K=tile.columns, BLOCK_D=block_d, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    launch("nearest", CONFIGS, CANDIDATES, key, sizes, run)


def _nearest_of_group(
    key: Tensor,
    kept: Tensor,
    evicted: Tensor,
    value: Tensor | None,
    group: Tensor | None,
    kept_key: Tensor | None,
    kept_value: Tensor | None,
    pivot: Tensor,
    similarity: Tensor,
) -> None:
    batch, heads, tokens, width = key.shape
    own_rows = kept_key is not None or kept_value is not None
    lefts = (key, key if value is None else value)
    # of the two either both are merged rows, or none is: places and tokens are not mixed
    if own_rows and kept_key is None:
        kept_key = _kept_rows(key, kept)
    if own_rows and value is not None and kept_value is None:
        kept_value = _kept_rows(value, kept)
    rights = (key if kept_key is None else kept_key, lefts[1] if kept_value is None else kept_value)
    inverses = [_inverse_norms(x) for x in (lefts if value is not None else lefts[:1])]
    kept_inverses = [_inverse_norms(x) for x in rights[: len(inverses)]] if own_rows else inverses
    strides = [stride for x in (*lefts, *rights) for stride in x.stride()[:3]]
    groups = kept if group is None else group.contiguous()
    sizes = (heads, tokens, kept.shape[2], evicted.shape[2], width, lefts[1].shape[3])
    blocks = {"BLOCK_DK": padded_width(width, key.dtype), "BLOCK_DV": padded_width(sizes[-1], lefts[1].dtype)}
    flags = {"HAS_VALUE": value is not None, "HAS_GROUP": group is not None, "OWN_ROWS": own_rows}

    def run(tile: Config) -> None:
        _nearest_of_group_kernel[(triton.cdiv(evicted.shape[2], tile.rows) * batch * heads,)](
            *lefts, *rights, inverses[0], inverses[-1], kept_inverses[0], kept_inverses[-1], kept, evicted, groups,
            pivot, similarity, *strides, *sizes, BLOCK_E=tile.rows, BLOCK_K=tile.columns, **blocks, **flags,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip

    launch("nearest_of_group", GROUP_CONFIGS, [], key, sizes, run, BOTH_FLOAT32)
