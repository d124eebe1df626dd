"""attention_scores: the column sums of the attention matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lookm_kernels._checks import (
    FLOAT_DTYPES,
    FP8,
    SCORE_DTYPES,
    accumulation_dtype,
    check_ascending,
    check_attention,
    check_call,
    check_device,
    check_indices,
    check_inside,
    check_shape,
    check_tensor,
    common_dtype,
    require,
)
from lookm_kernels._dispatch import implementation, register


def attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
    query_weight: Tensor | None = None,
    key_start: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    query_position: Tensor | None = None,
    head_scale: Tensor | None = None,
) -> Tensor:
    """Attention each cached token received, per KV head (LOOK-M, section 3.2; H2O's accumulated score).

        s[h, j] = sum over the G = Hq / H query heads g of KV head h and over the queries i of
                  query_weight[i] * softmax_j(scale * head_scale[g] * q_i . k_j + mask)

    The attention matrix is never held as a whole.

    Args:
        query: [B, Hq, M, D], after rotary embedding. Query i stands at position i + N - M (right-aligned), M <= N,
            unless query_position says otherwise.
        key: [B, H, N, D], as cached. Both float16, bfloat16, float32 or float64, of two dtypes the narrower becomes the
            other, which is exact (float32 for float16 and bfloat16); or both float8_e4m3fn.
        scale: factor of the logits, positive; D ** -0.5 by default.
        causal: a query sees no key after its own position.
        lse: [B, Hq, M] float32 (float64 if query or key is), natural-log sum of the exponentials of each query's
            visible logits, when known; computed otherwise.
        query_weight: [B, M] float32 (or float64): 1 by default; 0 leaves a query out. [B, W, M]: W weightings at once,
            such as those of text and of image queries. Each costs a product for the queries that it does not leave out,
            so that queries shared out among the weightings cost one pass in all on the reference backend; on the others
            each costs a pass, but the log-sum-exp is computed once.
        key_start: [B] int32, first position of each row that is not padding. Earlier keys are seen by nobody, earlier
            queries count 0.
        mask: bool [B or 1, Hq or 1, M, N], True where a query may see a key, in addition to causal and key_start.
        softcap: logits become softcap * tanh(logits / softcap), before the mask.
        query_position: [B, M] int32, where each query stands among the N tokens: strictly ascending, -1 (first) for an
            empty place, which counts 0. For queries picked out of a prompt: the time falls with their number.
        head_scale: [B, Hq] float32 (or float64), a positive factor of a head's logits beside scale: what quantize_heads
            divided float8 queries and keys by. Products of float8 are added up as precisely as the GPU's matrix units
            do it, on Hopper in fewer bits than float32 has.

    Returns:
        [B, H, N] float32 (float64 if query or key is), [B, W, H, N] for W weightings, each with the bits of a call of
        its own. A query that sees no key contributes nothing.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes, devices or head counts that do not fit, M > N, an empty tensor, scale or softcap <= 0,
            key_start, query_position or head_scale out of range, or an input that requires a gradient.
    """
    check_call(query=query, key=key, lse=lse, query_weight=query_weight, key_start=key_start, mask=mask)
    check_call(query_position=query_position, head_scale=head_scale)
    return torch.ops.lookm.attention_scores(  # type: ignore[no-any-return]
        query, key, scale, causal, lse, query_weight, key_start, mask, softcap, query_position, head_scale
    )


def _check(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    causal: bool,
    lse: Tensor | None,
    query_weight: Tensor | None,
    key_start: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    query_position: Tensor | None,
    head_scale: Tensor | None,
) -> None:
    check_attention(query, key, key_start, mask, scale, softcap, (*FLOAT_DTYPES, FP8))
    batch, heads, queries, _ = query.shape
    require((key.dtype == FP8) == (query.dtype == FP8), "key", "float8_e4m3fn where `query` is, and only there", key)
    check_device("query", query, lse=lse, query_weight=query_weight)
    if lse is not None:
        check_tensor("lse", lse, "B Hq M", (accumulation_dtype(common_dtype(query, key)),))
        check_shape("lse", lse, (batch, heads, queries), "B Hq M")
    if query_weight is not None:
        several = isinstance(query_weight, Tensor) and query_weight.ndim == 3
        check_tensor("query_weight", query_weight, "B W M" if several else "B M", SCORE_DTYPES)
        weightings = (max(1, query_weight.shape[1]),) if several else ()
        check_shape("query_weight", query_weight, (batch, *weightings, queries), "B W M" if several else "B M")
    check_device("query", query, query_position=query_position, head_scale=head_scale)
    if query_position is not None:
        check_tensor("query_position", query_position, "B M", (torch.int32,))
        check_shape("query_position", query_position, (batch, queries), "B M")
    if head_scale is not None:
        check_tensor("head_scale", head_scale, "B Hq", SCORE_DTYPES)
        check_shape("head_scale", head_scale, (batch, heads), "B Hq")


def _run(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    causal: bool,
    lse: Tensor | None,
    query_weight: Tensor | None,
    key_start: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    query_position: Tensor | None,
    head_scale: Tensor | None,
) -> Tensor:
    _check(query, key, scale, causal, lse, query_weight, key_start, mask, softcap, query_position, head_scale)
    check_inside("key_start", key_start, key.shape[2])
    if query_position is not None:
        check_indices("query_position", query_position, key.shape[2])
        check_ascending("query_position", query_position)
    if head_scale is not None and head_scale.device.type == "cpu":
        require(not bool((head_scale <= 0).any()), "head_scale", "positive", head_scale.min().item())
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = common_dtype(query, key)
    query, key = query.to(dtype), key.to(dtype)
    run = implementation("attention_scores", "scores", query)
    return run(  # type: ignore[no-any-return]
        query, key, scale, causal, lse, query_weight, key_start, mask, softcap, query_position, head_scale
    )


def _fake(query: Tensor, key: Tensor, *options: Any) -> Tensor:
    _check(query, key, *options)
    query_weight: Tensor | None = options[3]
    weightings = () if query_weight is None else query_weight.shape[1:-1]
    shape = (key.shape[0], *weightings, *key.shape[1:3])
    return query.new_empty(shape, dtype=accumulation_dtype(common_dtype(query, key)))


register(
    "attention_scores(Tensor query, Tensor key, float? scale, bool causal, Tensor? lse, Tensor? query_weight, "
    "Tensor? key_start, Tensor? mask, float? softcap, Tensor? query_position, "
    "Tensor? head_scale) -> Tensor",
    _run,
    _fake,
)
