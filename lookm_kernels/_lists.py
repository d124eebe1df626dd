"""The lists that a selection fills, of one size for all rows."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_lists(scores: Tensor, keep: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """kept [B, H, K] and evicted [B, H, E] int32, unwritten, for scores [B, H, N], and what each row keeps.

    The last is [B] int32 on the device of the scores, None where all rows keep alike.
    """
    batch, heads, tokens = scores.shape
    kept = scores.new_empty((batch, heads, max(keep)), dtype=torch.int32)
    evicted = scores.new_empty((batch, heads, tokens - min(keep)), dtype=torch.int32)
    if len(keep) == 1:
        return kept, evicted, None
    # filled on the device: a copy from the host would wait
    keeps = scores.new_empty(batch, dtype=torch.int32)
    for row, number in enumerate(keep):
        keeps[row].fill_(number)
    return kept, evicted, keeps
