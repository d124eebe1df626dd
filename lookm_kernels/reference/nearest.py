"""Nearest kept key by cosine, a block of evicted tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lookm_kernels._ambient import whole_products
from lookm_kernels._checks import accumulation_dtype
from lookm_kernels.reference._blocks import rows_per_block


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
    """See lookm_kernels.nearest_kept. Row by row, so that the rest of the batch changes no bit."""
    pivot = torch.full_like(evicted, -1)
    similarity = torch.zeros(evicted.shape, dtype=accumulation_dtype(key.dtype), device=key.device)
    for row in range(key.shape[0]):
        # without the places that only other rows fill: the row's products have the same shape, so the same bits, alone
        first, begin = _leading_empty(kept[row]), _leading_empty(evicted[row])
        if first == kept.shape[-1] or begin == evicted.shape[-1]:
            continue
        listed = kept[row, :, first:]
        empty = listed < 0
        compared = [(key[row], None if kept_key is None else kept_key[row, :, first:])]
        if value is not None:
            compared.append((value[row], None if kept_value is None else kept_value[row, :, first:]))
        pivots = [_unit(_take(rows, listed) if own is None else _own(own)) for rows, own in compared]
        own_group = None if group is None else _group_of(group[row], listed)
        first_equal = _first_equal(torch.cat(pivots, -1), empty, own_group)
        for part in torch.split(evicted[row, :, begin:], rows_per_block(listed.numel()), dim=-1):
            with whole_products(key.device):
                cosines = [
                    (_unit(_take(rows, part)) @ unit.transpose(1, 2)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                    for (rows, _), unit in zip(compared, pivots, strict=True)
                ]
            cosine = cosines[0] if value is None else cosines[0].add_(cosines[1]).div_(2)
            cosine.masked_fill_(empty[:, None], float("-inf"))
            if group is not None and own_group is not None:
                cosine.masked_fill_(_group_of(group[row], part)[..., None] != own_group[:, None], float("-inf"))
            best, place = cosine.max(-1)
            merges = (part >= 0) & best.isfinite()
            if min_similarity is not None:
                merges &= best >= min_similarity[row, :, None]
            here = slice(begin, begin + part.shape[-1])
            pivot[row, :, here] = torch.where(merges, first_equal.gather(-1, place).int() + first, -1)
            similarity[row, :, here] = torch.where(merges, best, 0.0)
            begin = here.stop
    return pivot, similarity


def _leading_empty(indices: Tensor) -> int:
    """How many of the first columns of indices [H, X] are empty (-1) in every head."""
    return int((indices < 0).all(0).cumprod(0).sum())


def _take(key: Tensor, indices: Tensor) -> Tensor:
    """Rows of key [H, N, D] at indices [H, X] (-1 reads row 0: the caller masks it), in the accumulation dtype."""
    place = indices.clamp(min=0).long()[..., None].expand(-1, -1, key.shape[-1])
    return key.gather(1, place).to(accumulation_dtype(key.dtype))


def _own(rows: Tensor) -> Tensor:
    return rows.to(accumulation_dtype(rows.dtype))


def _group_of(group: Tensor, indices: Tensor) -> Tensor:
    """Groups [H, X] of the tokens at indices [H, X], out of group [N]."""
    return group.expand(len(indices), -1).gather(1, indices.clamp(min=0).long())


def _unit(key: Tensor) -> Tensor:
    norm = key.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, key / norm, 0.0)


def _first_equal(unit: Tensor, empty: Tensor, group: Tensor | None) -> Tensor:
    """The first place with the same key and group, for every place of unit [H, K, D], empty and group [H, K].

    A matrix product rounds differently at its edges, so that of two equal keys either may have the greater cosine.
    """
    # adding 0 turns -0 into 0; whole numbers sum to the same in any order
    bits = (unit + 0.0).view(torch.int64 if unit.dtype == torch.float64 else torch.int32)
    classes = [empty] if group is None else [empty, group]
    bits = torch.cat([bits, *(of[..., None].to(bits.dtype) for of in classes)], -1)
    factors = torch.arange(1, 2 * bits.shape[-1], 2, dtype=torch.long, device=bits.device)
    order = (bits * factors).sum(-1).argsort(stable=True)
    sorted_bits = bits.gather(1, order[..., None].expand_as(bits))
    starts = pad((sorted_bits[:, 1:] != sorted_bits[:, :-1]).any(-1), (1, 0), value=True)
    group = torch.arange(order.shape[-1], dtype=torch.long, device=bits.device).where(starts, 0).cummax(-1).values
    return torch.empty_like(order).scatter_(-1, order, order.gather(-1, group))
