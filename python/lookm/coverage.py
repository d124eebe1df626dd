"""Which tokens of every image go before the others: floors and even grids, as levels above the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm.prompt import PADDING, TEXT, Prompt, on_device


def floor_levels(scores: Tensor, segment: Tensor, floor: int) -> Tensor:
    """[B, H, N] int64: `floor` for the best token of every image, one less for the next, ..., 0 from there on.

    scores [B, H, N], segment [B, N] (Prompt.segment). Were the budget too small for all of them, every image would
    still have its best token before any has its second.
    """
    segment = segment[:, None].expand_as(scores)
    order = _by_score(scores)
    order = order.gather(-1, segment.gather(-1, order).argsort(dim=-1, stable=True))
    own = segment.gather(-1, order)
    place = torch.arange(own.shape[-1], device=own.device).expand_as(own)
    first = torch.ones_like(own, dtype=torch.bool)
    first[..., 1:] = own[..., 1:] != own[..., :-1]
    rank = place - torch.where(first, place, 0).cummax(-1).values
    levels = (floor - rank).clamp(min=0).masked_fill(own < 0, 0)
    return torch.empty_like(levels).scatter_(-1, order, levels)


def grid_levels(prompt: Prompt, tier: Tensor, share: float) -> Tensor:
    """[B, 1, N] int64: 1 for the tokens of an even grid over every image, which take `share` of the image budget.

    tier [B, N]: selection classes; the image budget is what text and protected tokens leave. A picture of L tokens that
    gets q of them has place p on the grid where floor((p q + L / 2) / L) is more than at p - 1.
    """
    segment = prompt.segment.long()
    left = on_device(prompt.keep, segment.device) - (tier >= TEXT).sum(1, keepdim=True)
    images = segment.amax(1, keepdim=True) + 1
    each = (left.clamp(min=0) * share / images.clamp(min=1)).floor().long()
    inside = prompt.image & (tier != PADDING)
    index = segment.clamp(min=0)
    counts = torch.zeros_like(index).scatter_add_(1, index, inside.long())
    length = counts.gather(1, index).clamp(min=1)
    begin = (inside.cumsum(1) - 1).masked_fill(~inside, 0)
    first = torch.full_like(index, index.shape[1]).scatter_reduce_(
        1, index, torch.where(inside, begin, index.shape[1]), "amin"
    )
    place = begin - first.gather(1, index)
    on_grid = (place * each + length // 2) // length != ((place - 1) * each + length // 2) // length
    return (on_grid & inside)[:, None].long()


def with_levels(scores: Tensor, levels: Tensor) -> Tensor:
    """[B, H, N] float32 whole numbers in the order of (level, score), ties to the lower index as in select_tokens."""
    order = _by_score(scores)
    order = order.gather(-1, levels.expand_as(scores).gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    size = scores.shape[-1]
    rank = torch.arange(size, 0, -1, dtype=torch.float32, device=scores.device).expand_as(scores)
    return torch.empty_like(scores, dtype=torch.float32).scatter_(-1, order, rank)


def _by_score(scores: Tensor) -> Tensor:
    # what is no number comes last, as in select_tokens
    return torch.where(scores.isfinite(), scores, float("-inf")).argsort(dim=-1, descending=True, stable=True)
