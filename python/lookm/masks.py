"""Masks: the padding mask of a compressed cache, and an attention call's mask as scoring arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def stored_mask(valid: Tensor | None, new: Tensor | None, offset: int, stored: int, batch: int, queries: int) -> Tensor:
    """The 2D mask [B, offset + stored + q] that is true for a cache of `stored` places followed by q new tokens.

    valid [B, stored] and new [B, q] bool, None where nothing is masked. The first `offset` columns stand for evicted
    tokens: they are out of every layer's reach.
    """
    device = next((part.device for part in (new, valid) if part is not None), None)
    mask = torch.ones(batch, offset + stored + queries, dtype=torch.bool, device=device)
    mask[:, :offset] = False
    if valid is not None:
        mask[:, offset : offset + stored] = valid.to(device)
    if new is not None:
        mask[:, offset + stored :] = new
    return mask


def visible(mask: Tensor, stored: int) -> Tensor:
    """A 4D attention mask, bool or additive, as bool [B, heads, q, stored]."""
    mask = mask[..., :stored]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def is_4d(mask: Any) -> bool:
    """Whether an attention call got a mask per query and key, rather than none or a padding mask."""
    return isinstance(mask, Tensor) and mask.ndim == 4


def left_padding(valid: Tensor | None) -> Tensor | None:
    """[B] int32, the first valid place of each row of valid [B, N]; None where nothing or more than that is masked."""
    if valid is None:
        return None
    places = valid.shape[1]
    first = torch.where(valid.any(1), valid.int().argmax(1), places)
    return first.int() if bool((valid == (torch.arange(places, device=valid.device) >= first[:, None])).all()) else None


def scoring_mask(
    mask: Any, plain: bool, causal: bool, valid: Tensor | None, key_start: Tensor | None, queries: int, stored: int
) -> dict[str, Any]:
    """The mask of an attention call as the arguments causal, key_start and mask of attention_scores.

    mask: what the attention got; plain: it is known to be causal and padded, nothing else; valid [B, stored] bool or
        None, and its left_padding.
    A mask known to be plain is given as causal and key_start, which need not be read by key and query.
    """
    if is_4d(mask) and not plain:
        return {"causal": False, "key_start": key_start, "mask": visible(mask, stored)}
    if valid is not None and key_start is None:
        return {"causal": causal, "key_start": None, "mask": valid[:, None, None].expand(-1, 1, queries, -1)}
    return {"causal": causal, "key_start": key_start, "mask": None}
