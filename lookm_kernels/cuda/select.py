"""Radix selection on (tier, score), then an ordered compaction: csrc/select.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm_kernels import _native


def select_tokens(scores: Tensor, tier: Tensor, keep: list[int]) -> tuple[Tensor, Tensor]:
    """See lookm_kernels.select_tokens."""
    batch, heads, tokens = scores.shape
    kept = scores.new_empty((batch, heads, max(keep)), dtype=torch.int32)
    evicted = scores.new_empty((batch, heads, tokens - min(keep)), dtype=torch.int32)
    keeps = None
    if len(keep) > 1:
        # filled on the device: a copy from the host would wait
        keeps = scores.new_empty(batch, dtype=torch.int32)
        for row, number in enumerate(keep):
            keeps[row].fill_(number)
    scores, tier = scores.contiguous(), tier.contiguous()
    _native.call(
        "select", scores.data_ptr(), tier.data_ptr(), 0 if keeps is None else keeps.data_ptr(),
        kept.data_ptr(), evicted.data_ptr(), batch, heads, tokens, keep[0], kept.shape[2], evicted.shape[2],
        _native.stream(scores.device),
    )  # fmt: skip
    return kept, evicted
