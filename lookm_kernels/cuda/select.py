"""Radix selection on (tier, score), then an ordered compaction: csrc/select.cu."""

from __future__ import annotations

from torch import Tensor

from lookm_kernels import _native
from lookm_kernels._lists import empty_lists


def select_tokens(scores: Tensor, tier: Tensor, keep: list[int]) -> tuple[Tensor, Tensor]:
    """See lookm_kernels.select_tokens."""
    batch, heads, tokens = scores.shape
    kept, evicted, keeps = empty_lists(scores, keep)
    scores, tier = scores.contiguous(), tier.contiguous()
    _native.call(
        "select", scores.data_ptr(), tier.data_ptr(), 0 if keeps is None else keeps.data_ptr(),
        kept.data_ptr(), evicted.data_ptr(), batch, heads, tokens, keep[0], kept.shape[2], evicted.shape[2],
        _native.stream(scores.device),
    )  # fmt: skip
    return kept, evicted
