"""Column sums of the attention matrix, a block of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm_kernels._ambient import whole_products
from lookm_kernels._checks import accumulation_dtype
from lookm_kernels.reference._blocks import rows_per_block


def attention_scores(
    query: Tensor,
    key: Tensor,
    scale: float,
    causal: bool,
    lse: Tensor | None,
    query_weight: Tensor | None,
    key_start: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    query_position: Tensor | None,
    head_scale: Tensor | None,
) -> Tensor:
    """See lookm_kernels.attention_scores. Row by row over its valid tokens: padding and other rows change no bit."""
    if query_weight is not None and query_weight.ndim == 3:
        # a weighting multiplies only the queries that it does not leave out
        rest = key_start, mask, softcap, query_position, head_scale
        each = [attention_scores(query, key, scale, causal, lse, weight, *rest) for weight in query_weight.unbind(1)]
        return torch.stack(each, 1)
    batch, queries, tokens = query.shape[0], query.shape[2], key.shape[2]
    scores = torch.zeros(key.shape[:3], dtype=accumulation_dtype(query.dtype), device=query.device)
    starts = [0] * batch if key_start is None else key_start.tolist()
    for row, start in enumerate(starts):
        if start == tokens:
            continue
        own = torch.arange(queries, dtype=torch.long, device=query.device) + (tokens - queries)
        position = (own if query_position is None else query_position[row].long()) - start
        # they ascend: padding and empty places come first
        first = int((position < 0).sum())
        with whole_products(query.device):
            scores[row, :, start:] = _row_scores(
                query[row, :, first:],
                key[row, :, start:],
                position[first:],
                scale if head_scale is None else scale * head_scale[row],
                causal,
                None if lse is None else lse[row, :, first:],
                None if query_weight is None else query_weight[row, first:],
                None if mask is None else mask[row if mask.shape[0] > 1 else 0, :, first:, start:],
                softcap,
            )
    return scores


def _row_scores(
    query: Tensor,
    key: Tensor,
    position: Tensor,
    scale: float | Tensor,
    causal: bool,
    lse: Tensor | None,
    query_weight: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """query [Hq, M, D], key [H, N, D], scale a number or [Hq], lse [Hq, M], mask [Hq or 1, M, N] -> [H, N].

    position and query_weight: [M].
    """
    heads, queries, width = query.shape
    kv_heads, tokens, _ = key.shape
    dtype = accumulation_dtype(query.dtype)
    key_columns = key.to(dtype).contiguous().transpose(1, 2)
    scores = torch.zeros(kv_heads, tokens, dtype=dtype, device=query.device)
    used = torch.arange(queries, dtype=torch.long, device=query.device)
    if query_weight is not None:
        used = query_weight.nonzero()[:, 0]
    block = rows_per_block(heads * tokens)
    for begin in range(0, used.shape[0], block):
        rows = slice(begin, begin + block) if query_weight is None else used[begin : begin + block]
        here = position[rows]
        seen = int(here[-1]) + 1 if causal else tokens
        part = query[:, rows].to(dtype).reshape(kv_heads, -1, width)
        alpha = scale if isinstance(scale, float) else 1.0
        logits = torch.baddbmm(scores.new_empty(()), part, key_columns[:, :, :seen], beta=0, alpha=alpha)
        logits = logits.view(heads, -1, seen)
        if isinstance(scale, Tensor):
            logits *= scale[:, None, None]
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if causal:
            first = int(here[0]) + 1
            future = torch.arange(first, seen, dtype=torch.long, device=query.device) > here[:, None]
            logits[:, :, first:].masked_fill_(future, float("-inf"))
        if mask is not None:
            logits.masked_fill_(~mask[:, rows, :seen], float("-inf"))
        attention = _attention(logits, mask is not None, None if lse is None else lse[:, rows, None].to(dtype))
        weight = torch.ones(len(here), dtype=dtype, device=query.device)
        if query_weight is not None:
            weight = query_weight[rows].to(dtype)
        summed = weight.repeat(heads // kv_heads).expand(kv_heads, 1, -1) @ attention.view(kv_heads, -1, seen)
        scores[:, :seen] += summed[:, 0]
    return scores


def _attention(logits: Tensor, masked: bool, lse: Tensor | None) -> Tensor:
    """Softmax of logits [Hq, rows, seen], which it may overwrite; 0 for a query that sees nothing."""
    if lse is not None:
        # the sum of no exponentials may be given as its logarithm, -inf
        return logits.sub_(lse.masked_fill(lse == float("-inf"), 0.0)).exp_()
    if not masked:
        return logits.softmax(-1)
    sees_nothing = logits.amax(-1, keepdim=True) == float("-inf")
    return logits.softmax(-1).masked_fill_(sees_nothing, 0.0)
