"""kept_attention: few queries over the pairs that a cache holds, each with a bias of its own."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lookm_kernels._checks import (
    accumulation_dtype,
    check_device,
    check_rows,
    check_shape,
    check_tensor,
    require,
)
from lookm_kernels._dispatch import implementation, register, register_backward
from lookm_kernels.merge import check_given
from lookm_kernels.reference.kept_attention import kept_attention as plain_kept_attention


def kept_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    key_start: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of M queries, the last of N tokens, over the N stored pairs.

        output[i] = sum over j of softmax_j(cap(q_i . k_j * scale) + key_bias[j]) v_j
        cap(x) = softcap tanh(x / softcap)

    With key_bias = log(votes) a pair draws the attention of all the tokens that merged into it (proportional attention,
    ToMe, arXiv 2210.09461; KeepKV, arXiv 2504.09936): sum of m equal exp(q . k) v = m exp(q . k) v. Query heads of one
    KV head read its pairs together. Sums are in float32 (float64 for float64); the number of parts they are cut into
    depends on N and M alone, so the rest of the batch changes no bit.

    Args:
        query: [B, Hq, M, D], key: [B, H, N, D], value: [B, H, N, Dv], float16, bfloat16, float32 or float64; they are
            promoted where they differ, as under torch.autocast. Hq is a multiple of H, M <= N.
        key_bias: [B, H, P] float32, P <= N: of the first P keys; the others have none. -inf hides a key.
        key_start: [B] int32, the first key of each row that is no padding.
        mask: bool [B or 1, Hq or 1, M, N], True where a query may see a key; besides the others.
        causal: query i sees keys 0 to N - M + i only.
        scale: D ** -0.5 by default. softcap: of the scaled logits, none by default.
        return_lse: whether to return the log-sum-exp of the logits too.

    Returns:
        output [B, Hq, M, Dv] of query's dtype; with return_lse (output, lse [B, Hq, M] float32, float64 for float64). A
        query that sees nothing has output 0 and lse -inf. The output has gradients for query, key and value.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes or devices that do not fit.
    """
    require(isinstance(query, Tensor), "query", "a tensor [B, Hq, M, D]", query)
    check_given(key_bias=key_bias, key_start=key_start, mask=mask)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    output, lse = torch.ops.lookm.kept_attention(query, key, value, key_bias, key_start, mask, causal, scale, softcap)
    return (output, lse) if return_lse else output


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    key_start: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> None:
    check_rows("query", query, "B Hq M D")
    check_rows("key", key, "B H N D")
    check_rows("value", value, "B H N Dv")
    (batch, heads, queries, width), (_, kv_heads, tokens, _) = query.shape, key.shape
    fits = key.shape[0] == batch and key.shape[3] == width and heads % kv_heads == 0
    require(fits, "key", f"[{batch}, a divisor of {heads}, N, {width}] like `query`", key)
    require(queries <= tokens, "query", f"at most {tokens} queries, as many as there are keys", query)
    require(value.shape[:3] == key.shape[:3], "value", f"[B, H, N] = {list(key.shape[:3])} like `key`", value)
    check_device("query", query, key=key, value=value)
    if key_bias is not None:
        check_tensor("key_bias", key_bias, "B H P", (torch.float32,))
        fits = key_bias.shape[:2] == key.shape[:2] and key_bias.shape[2] <= tokens
        require(fits, "key_bias", f"[{batch}, {kv_heads}, at most {tokens}]", key_bias)
        check_device("query", query, key_bias=key_bias)
    if key_start is not None:
        check_tensor("key_start", key_start, "B", (torch.int32,))
        check_shape("key_start", key_start, (batch,), "B")
        check_device("query", query, key_start=key_start)
    if mask is not None:
        check_tensor("mask", mask, "B Hq M N", (torch.bool,))
        fits = mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads) and mask.shape[2:] == (queries, tokens)
        require(fits, "mask", f"[{batch} or 1, {heads} or 1, {queries}, {tokens}]", mask)
        check_device("query", query, mask=mask)
    require(scale > 0, "scale", "None or a positive number", scale)
    require(softcap is None or softcap > 0, "softcap", "None or a positive number", softcap)


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _run(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(query, key, value, *rest)
    if rest[1] is not None and rest[1].device.type == "cpu":
        inside = int(rest[1].min()) >= 0 and int(rest[1].max()) <= key.shape[2]
        require(inside, "key_start", f"positions from 0 to {key.shape[2]}", rest[1].tolist())
    dtype = _common_dtype(query, key, value)
    run = implementation("kept_attention", "kept_attention", query.to(dtype), key)
    output, lse = run(query.to(dtype), key.to(dtype), value.to(dtype), *rest)
    return output.to(query.dtype), lse


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(query, key, value, *rest)
    lse = query.new_empty(query.shape[:3], dtype=accumulation_dtype(_common_dtype(query, key, value)))
    return query.new_empty((*query.shape[:3], value.shape[3])), lse


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[6:]


def _backward(context: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """By the plain torch version, computed once more: few queries, whose graph need not be kept."""
    query, key, value, *given = context.saved_tensors
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        dtype = _common_dtype(*inputs)
        results = plain_kept_attention(*(tensor.to(dtype) for tensor in inputs), *given, *context.rest)
        gradients = torch.autograd.grad(results, inputs, (grad_output.to(dtype), grad_lse), allow_unused=True)
    return (*gradients, *(None for _ in (*given, *context.rest)))


register(
    "kept_attention(Tensor query, Tensor key, Tensor value, Tensor? key_bias, Tensor? key_start, Tensor? mask, "
    "bool causal, float scale, float? softcap) -> (Tensor, Tensor)",
    _run,
    _fake,
)
register_backward("kept_attention", _backward, _keep_inputs)
