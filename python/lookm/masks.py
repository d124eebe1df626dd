"""Masks: the padding mask of a compressed cache, and an attention call's mask as scoring arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

# backends that add their mask to the logits, and do nothing about causality without one
ADDITIVE = ("eager", "flex_attention")
# an additive mask hides a key from here down: the softmax of what is left never sees it
HIDDEN_BELOW = -1e4
BIASED = (
    "lookm: this attention adds a bias to its logits (a finite value in a mask of {dtype}); scores without it would "
    "not describe the attention that was paid: not supported"
)


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


def step_mask(queries: int, device: torch.device | None) -> Tensor:
    """What stands for a mask where a cache of fixed size knows all there is to know: 4D, so that nobody makes another.

    [1, 1, q, 0]: no column is built or read, and its shape does not change from step to step.
    """
    return torch.ones(1, 1, queries, 0, dtype=torch.bool, device=device)


def is_step_mask(mask: Any) -> bool:
    """Whether this is a step_mask."""
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[3] == 0


def is_4d(mask: Any) -> bool:
    """Whether an attention call got a mask per query and key, rather than none or a padding mask."""
    return isinstance(mask, (Tensor, BlockMask)) and len(mask.shape) == 4


def visible(mask: Tensor | BlockMask, implementation: str, queries: int, stored: int) -> Tensor:
    """What a 4D attention mask lets be seen: bool [B or 1, heads or 1, q, stored].

    Additive masks hide where they are -10,000 or less. NotImplementedError where one has other values than 0 besides.
    """
    if isinstance(mask, BlockMask):
        batch, heads = mask.shape[:2]
        # one head stands for all of them
        seen: Tensor = create_mask(mask.mask_mod, batch, heads, queries, stored, device=mask.kv_num_blocks.device)
        return seen
    mask = mask[..., :stored].expand(-1, -1, queries, -1)
    if mask.dtype == torch.bool and implementation not in ADDITIVE:
        return mask
    hidden = mask <= HIDDEN_BELOW
    if bool(((mask != 0) & ~hidden).any()):
        raise NotImplementedError(BIASED.format(dtype=mask.dtype))
    return ~hidden


def causal_without_mask(implementation: str, module: Any, is_causal: bool | None) -> bool:
    """Whether a backend that gets no mask per query hides the future by itself."""
    if implementation in ADDITIVE:
        return False
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def left_padding(valid: Tensor | None) -> Tensor | None:
    """[B] int32, the first valid place of each row of valid [B, N]; None where nothing or more than that is masked."""
    if valid is None:
        return None
    places = valid.shape[1]
    first = torch.where(valid.any(1), valid.int().argmax(1), places)
    return first.int() if bool((valid == (torch.arange(places, device=valid.device) >= first[:, None])).all()) else None


def padding_mask(valid: Tensor | None, key_start: Tensor | None, queries: int) -> dict[str, Any]:
    """Padding as the arguments key_start and mask of attention_scores: valid [B, stored] and its left_padding."""
    if valid is None or key_start is not None:
        return {"key_start": key_start, "mask": None}
    return {"key_start": None, "mask": valid[:, None, None].expand(-1, 1, queries, -1)}


def hide_places(mask: Tensor | None, hidden: Tensor, implementation: str, query: Tensor, causal: bool) -> Tensor:
    """An attention call's mask that hides places of single heads too.

    mask: what the call got: None, or 4D. hidden [B, H, N] bool: places of each KV head that query [B, Hq, M, D] may not
    see. NotImplementedError for a mask that cannot tell heads apart.
    """
    batch, heads, stored = hidden.shape
    queries = query.shape[2]
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
        raise NotImplementedError(
            f"lookm: attention_mask hides tokens of the compressed prompt, which {implementation} attention cannot do "
            "head by head; use sdpa or eager"
        )
    hidden = hidden.repeat_interleave(query.shape[1] // heads, 1)[:, :, None]
    if mask is None:
        seen = torch.ones(queries, stored, dtype=torch.bool, device=hidden.device)
        mask = seen.tril(stored - queries) if causal else seen
        if implementation in ADDITIVE:
            mask = torch.zeros_like(mask, dtype=query.dtype)
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.expand(batch, query.shape[1], -1, -1).masked_fill(hidden, torch.finfo(mask.dtype).min)
