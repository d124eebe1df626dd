"""Selection by two stable sorts."""

from __future__ import annotations

import torch
from torch import Tensor


def select_tokens(scores: Tensor, tier: Tensor, keep: list[int]) -> tuple[Tensor, Tensor]:
    """See lookm_kernels.select_tokens."""
    tier = tier[:, None].expand_as(scores)
    order = torch.where(scores.isfinite(), scores, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, tier.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    rank = torch.arange(scores.shape[-1], dtype=torch.long, device=scores.device)
    stays = rank < torch.tensor(keep, dtype=torch.long, device=scores.device).view(-1, 1, 1)
    valid = tier.gather(-1, order) > 0
    kept = order.masked_fill(~(stays & valid), -1)[..., : max(keep)]
    evicted = order.masked_fill(~(~stays & valid), -1)[..., min(keep) :]
    return kept.sort(dim=-1).values.int(), evicted.sort(dim=-1).values.int()
