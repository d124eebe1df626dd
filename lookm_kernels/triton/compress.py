"""The whole compression: one selection, then pivots, merge and compaction, without waiting for the device."""

from __future__ import annotations

from torch import Tensor

from lookm_kernels.rules import merge_weights
from lookm_kernels.triton.compact import compact_
from lookm_kernels.triton.merge import merge_
from lookm_kernels.triton.nearest import nearest_kept
from lookm_kernels.triton.select import select_tokens


def compress_(
    key: Tensor, value: Tensor, scores: Tensor, tier: Tensor, keep: list[int], rule: str, gate: str | None
) -> Tensor:
    """See lookm_kernels.compress_."""
    kept, evicted = select_tokens(scores, tier, keep)
    # "none" changes no kept row: its pivots need not be found
    if rule != "none":
        pivot, similarity = nearest_kept(key, kept, evicted)
        evicted_weight, kept_weight = merge_weights(rule, similarity, pivot, kept, gate)
        merge_(key, value, kept, evicted, pivot, evicted_weight, kept_weight)
    compact_(key, value, kept)
    return kept
