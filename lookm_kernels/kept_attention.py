"""kept_attention: queries over the pairs that stayed, each with the votes of what merged into it."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from lookm_kernels._checks import (
    accumulation_dtype,
    check_attention,
    check_call,
    check_device,
    check_inside,
    check_key_bias,
    check_row_positions,
    check_rows,
    check_tensors,
    common_dtype,
    require,
)
from lookm_kernels._dispatch import implementation, register, register_backward


@overload
def kept_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = ...,
    key_start: Tensor | None = ...,
    key_end: Tensor | None = ...,
    mask: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def kept_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = ...,
    key_start: Tensor | None = ...,
    key_end: Tensor | None = ...,
    mask: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def kept_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of few queries over many stored pairs, some of which stand for several tokens.

        out[i] = sum over j of softmax_j(softcap * tanh(scale * q_i . k_j / softcap) + key_bias[j]) * v_j

    With key_bias = log m, a pair that m tokens were merged into draws the attention of all of them: with equal keys,
    sum of exp(q . k) v over them = m exp(q . k) v_mean, which is exactly the attention before merging. Token merging
    calls this proportional attention (ToMe, arXiv 2210.09461); KeepKV (arXiv 2504.09936) gives kept pairs such votes.

    The attention matrix is never held as a whole, and keys are not expanded to the query heads. Gradients go to query,
    key and value; the backward pass computes the attention matrix anew, and holds it.

    Args:
        query: [B, Hq, M, D], after rotary embedding.
        key: [B, H, N, D], as cached; H divides Hq.
        value: [B, H, N, Dv]. All three float16, bfloat16, float32 or float64; of several dtypes they become the one
            that holds them all, which is exact.
        key_bias: [B, H, P] float32 (or float64), P <= N: added to the logits of the first P keys; the others get 0.
            -inf hides a key.
        key_start: [B] int32, first position of each row that is not padding. Nobody sees earlier keys.
        key_end: [B] int32, how many keys of each row are there, N by default: what lies behind them, the free places
            of a buffer of fixed size, is never used. Read on the device alone, so that a captured graph can follow it.
        mask: bool [B or 1, Hq or 1, M, N], True where a query may see a key, besides causal, key_start and key_end.
        causal: query i sees no key after position i + N - M (right-aligned, M <= N), with key_end[b] instead of N.
        scale: factor of the products, positive; D ** -0.5 by default.
        softcap: logits become softcap * tanh(logits / softcap), before the bias and the mask.
        return_lse: return the log-sum-exp too.

    Returns:
        [B, Hq, M, Dv] in the dtype of query, 0 for a query that sees nothing. With return_lse also [B, Hq, M] float32
        (float64 if one of the three is): the natural logarithm of the sum of the exponentials of each query's visible
        logits, -inf where it sees nothing.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes, devices or head counts that do not fit, M > N under a causal mask, an empty tensor, scale or
            softcap <= 0, key_start or key_end out of range, or a key_bias that requires a gradient.
    """
    check_tensors(query=query, key=key, value=value)
    check_call(key_bias=key_bias, key_start=key_start, key_end=key_end, mask=mask)
    out, lse = torch.ops.lookm.kept_attention(
        query, key, value, key_bias, key_start, key_end, mask, causal, scale, softcap
    )
    return (out, lse) if return_lse else out


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
) -> None:
    check_attention(query, key, key_start, mask, scale, softcap, right_aligned=causal)
    check_rows("value", value, "B H N Dv")
    require(value.shape[:3] == key.shape[:3], "value", f"[B, H, N, Dv] = {[*key.shape[:3]]} and Dv, like `key`", value)
    check_device("query", query, value=value)
    check_row_positions("key_end", key_end, query)
    check_key_bias(key_bias, query, key)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, key_bias, key_start, key_end, mask, causal, scale, softcap)
    check_inside("key_start", key_start, key.shape[2])
    check_inside("key_end", key_end, key.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = common_dtype(query, key, value)
    rows = query.to(dtype), key.to(dtype), value.to(dtype)
    # the first tensor's width is the head dimension that a backend must take
    widest = max(query, value, key=lambda x: x.shape[3])
    run = implementation("kept_attention", "kept_attention", widest, query, key, value)
    out, lse = run(*rows, key_bias, key_start, key_end, mask, causal, scale, softcap)
    return out.to(query.dtype), lse


def _fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    _check(query, key, value, *options)
    dtype = accumulation_dtype(common_dtype(query, key, value))
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    return out, query.new_empty(query.shape[:3], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, causal, scale, softcap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = causal, tensors[0].shape[-1] ** -0.5 if scale is None else scale, softcap


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    """The derivative of softmax, for all rows and queries at once; the heads of a KV head are rows of one product."""
    query, key, value, key_bias, key_start, key_end, mask, out, lse = ctx.saved_tensors
    causal, scale, softcap = ctx.options
    kv_heads, (queries, tokens) = key.shape[1], (query.shape[2], key.shape[2])

    def packed(x: Tensor) -> Tensor:
        return x.to(lse.dtype).reshape(x.shape[0], kv_heads, -1, x.shape[3])

    q, grad, keys, values = packed(query), packed(grad_out), key.to(lse.dtype), value.to(lse.dtype)
    logits = q @ keys.mT * scale
    slope = None
    if softcap is not None:
        bent = torch.tanh(logits / softcap)
        logits, slope = softcap * bent, 1 - bent * bent
    if key_bias is not None:
        logits = logits + pad(key_bias.to(lse.dtype), (0, tokens - key_bias.shape[2]))[:, :, None]
    position = torch.arange(tokens, dtype=torch.long, device=key.device)
    seen = torch.ones((1, 1, queries, tokens), dtype=torch.bool, device=key.device) if mask is None else mask
    end = position.new_full((1,), tokens) if key_end is None else key_end
    seen = seen & (position < end[:, None, None, None])
    if causal:
        last = end[:, None] - queries + torch.arange(queries, device=key.device)
        seen = seen & (position <= last[:, None, :, None])
    if key_start is not None:
        seen = seen & (position >= key_start[:, None, None, None])
    seen = seen.expand(*query.shape[:3], tokens).reshape(logits.shape)
    total = packed(lse[..., None])
    # a query that sees nothing has no finite logarithm, and pays no attention
    attention = (logits - total.masked_fill(total == float("-inf"), 0.0)).exp().masked_fill(~seen, 0.0)
    mean = (grad * packed(out)).sum(-1, keepdim=True) - packed(grad_lse[..., None])
    grad_logits = attention * (grad @ values.mT - mean)
    if slope is not None:
        grad_logits = grad_logits * slope
    grad_query = (grad_logits @ keys * scale).reshape(query.shape)
    grad_key, grad_value = grad_logits.mT @ q * scale, attention.mT @ grad
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), *[None] * 7


register(
    "kept_attention(Tensor query, Tensor key, Tensor value, Tensor? key_bias, Tensor? key_start, "
    "Tensor? key_end, Tensor? mask, bool causal, float? scale, float? softcap) -> (Tensor, Tensor)",
    _run,
    _fake,
)
register_backward("kept_attention", _backward, _save)
