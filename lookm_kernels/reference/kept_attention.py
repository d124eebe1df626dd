"""Attention over stored pairs, a block of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm_kernels._ambient import whole_products
from lookm_kernels._checks import accumulation_dtype
from lookm_kernels.reference._blocks import rows_per_block


def kept_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_start: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See lookm_kernels.kept_attention. Row by row over its own keys: the rest of the batch changes no bit.

    Made of operations that have derivatives, so it is its own backward pass too.
    """
    batch, heads, queries, _ = query.shape
    tokens = key.shape[2]
    starts = [0] * batch if key_start is None else key_start.tolist()
    outputs, sums = [], []
    for row, start in enumerate(starts):
        block = rows_per_block(heads * tokens)
        parts = []
        for begin in range(0, queries, block):
            end = min(queries, begin + block)
            # the last of these queries sees no key behind this one
            seen = tokens - queries + end if causal else tokens
            allowed = None if mask is None else mask[row if mask.shape[0] > 1 else 0, :, begin:end, start:seen]
            bias = None if key_bias is None else key_bias[row, :, start:seen]
            first = tokens - queries + begin - start if causal and (end - begin > 1 or start >= seen) else None
            part = query[row, :, begin:end], key[row, :, start:seen], value[row, :, start:seen]
            parts.append(_attend(*part, bias, allowed, first, scale, softcap))
        output, lse = (torch.cat(x, 1) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
        outputs.append(output)
        sums.append(lse)
    return torch.stack(outputs), torch.stack(sums)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    first: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """query [Hq, M, D], key [H, N, D], value [H, N, Dv], bias [H, P], mask [Hq or 1, M, N] -> [Hq, M, Dv] and [Hq, M].

    first: the last key that the first query sees, one more for each query after it; None: they see all.
    """
    heads, queries, width = query.shape
    kv_heads, tokens, _ = key.shape
    dtype = accumulation_dtype(query.dtype)
    packed = query.to(dtype).reshape(kv_heads, -1, width) * scale
    with whole_products(query.device):
        logits = packed @ key.to(dtype).transpose(1, 2)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if bias is not None:
        logits = logits + torch.nn.functional.pad(bias.to(dtype), (0, tokens - bias.shape[1]))[:, None]
    logits = logits.view(heads, queries, tokens)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    if first is not None:
        place = torch.arange(tokens, dtype=torch.long, device=query.device)
        own = torch.arange(first, first + queries, dtype=torch.long, device=query.device)
        logits = logits.masked_fill(place > own[:, None], float("-inf"))
    lse = logits.logsumexp(-1) if tokens else logits.new_full(logits.shape[:2], float("-inf"))
    # the sum of no exponentials: their weights are to be 0 all the same
    weight = (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    with whole_products(query.device):
        output = weight.view(kv_heads, -1, tokens) @ value.to(dtype)
    return output.view(heads, queries, -1).to(query.dtype), lse
