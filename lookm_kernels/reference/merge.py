"""Merging: evicted tokens grouped by pivot, each group summed in order."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm_kernels._checks import accumulation_dtype
from lookm_kernels.reference._blocks import rows_per_block
from lookm_kernels.reference.compact import compact_


def merge_(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    evicted: Tensor,
    pivot: Tensor,
    evicted_weight: Tensor,
    kept_weight: Tensor,
    votes: Tensor | None = None,
    out_votes: Tensor | None = None,
    out_key: Tensor | None = None,
    out_value: Tensor | None = None,
) -> None:
    """See lookm_kernels.merge_. A few heads at a time, which bounds the memory."""
    if out_votes is not None:
        _sum_votes(kept, evicted, pivot, evicted_weight, votes, out_votes)
    if out_key is None or out_value is None:
        outs, target = (key, value), kept.long()
    else:
        outs, target = (out_key, out_value), torch.arange(kept.shape[-1], device=kept.device).expand_as(kept)
        # all kept rows as they are; those that change are written again
        compact_(key, value, kept, *outs)
    block = rows_per_block(max(1, evicted.shape[-1]) * max(key.shape[-1], value.shape[-1]))
    for row in range(key.shape[0]):
        for begin in range(0, key.shape[1], block):
            here = (row, slice(begin, begin + block))
            lists = kept[here].long(), evicted[here].long(), pivot[here].long()
            _merge_heads(
                ((key[here], outs[0][here]), (value[here], outs[1][here])), target[here], *lists,
                evicted_weight[here], kept_weight[here],
            )  # fmt: skip


def _sum_votes(
    kept: Tensor, evicted: Tensor, pivot: Tensor, evicted_weight: Tensor, votes: Tensor | None, out: Tensor
) -> None:
    """out [B, H, K]: votes of every kept token and of those that merge into it, in the order of the evicted list."""
    merges = (evicted >= 0) & (pivot >= 0) & (evicted_weight != 0)
    size = kept.shape[-1]
    group = torch.where(merges, pivot, size).long()
    order = group.argsort(dim=-1, stable=True)
    lengths = torch.zeros((*kept.shape[:2], size + 1), dtype=torch.long, device=kept.device)
    lengths.scatter_add_(-1, group, torch.ones_like(group))
    if votes is None:
        out.copy_((1 + lengths[..., :size]).masked_fill(kept < 0, 0))
        return
    moving = votes.gather(-1, evicted.clamp(min=0).long().gather(-1, order))
    sums = torch.segment_reduce(moving.flatten(), "sum", lengths=lengths.flatten(), axis=0, unsafe=True, initial=0)
    own = votes.gather(-1, kept.clamp(min=0).long())
    out.copy_((own + sums.view(lengths.shape)[..., :size]).masked_fill(kept < 0, 0.0))


def _merge_heads(
    tensors: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    kept: Tensor,
    evicted: Tensor,
    pivot: Tensor,
    evicted_weight: Tensor,
    kept_weight: Tensor,
) -> None:
    """tensors: what is read [H, N, D] and what is written, of keys and values; target [H, K]: the row that is written.

    kept and kept_weight [H, K]; evicted, pivot and evicted_weight [H, E].
    """
    head, place = ((evicted >= 0) & (pivot >= 0) & (evicted_weight != 0)).nonzero(as_tuple=True)
    group = head * kept.shape[-1] + pivot[head, place]
    counts = torch.bincount(group, minlength=kept.numel())
    order = group.argsort(stable=True)
    head, place = head[order], place[order]
    changed = (kept >= 0) & ((counts.view_as(kept) > 0) | (kept_weight != 1))
    own_head, own_place = changed.nonzero(as_tuple=True)
    for tensor, out in tensors:
        dtype = accumulation_dtype(tensor.dtype)
        moving = tensor[head, evicted[head, place]].to(dtype) * evicted_weight[head, place, None].to(dtype)
        sums = torch.segment_reduce(moving, "sum", lengths=counts, axis=0, unsafe=True, initial=0)
        own = tensor[own_head, kept[own_head, own_place]].to(dtype) * kept_weight[own_head, own_place, None].to(dtype)
        out[own_head, target[own_head, own_place]] = (own + sums[changed.flatten()]).to(tensor.dtype)
