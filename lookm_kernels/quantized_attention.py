"""quantized_attention: queries over pairs in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lookm_kernels._checks import (
    FLOAT_DTYPES,
    accumulation_dtype,
    check_attention,
    check_call,
    check_device,
    check_inside,
    check_key_bias,
    check_row_positions,
    check_rows,
    check_shape,
    check_tensor,
    require,
)
from lookm_kernels._dispatch import implementation, register
from lookm_kernels._formats import CODES, blocks_of, channel_groups
from lookm_kernels.quantize import QuantizedPairs


def quantized_attention(
    query: Tensor,
    pairs: QuantizedPairs,
    *,
    key_bias: Tensor | None = None,
    key_end: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """kept_attention over quantised pairs that all precede the queries: each query sees all of them.

    The codes are read as they are; what they stand for is never held as a whole. To attend to whole pairs too, such as
    the newest, join the two by combine_attention.

    Args:
        query: [B, Hq, M, D] float16, bfloat16, float32 or float64, after rotary embedding; the products are of that
            dtype.
        pairs: see QuantizedPairs; H divides Hq. Nobody sees what is before pairs.key_start.
        key_bias, key_end, scale, softcap: as for kept_attention.

    Returns:
        out [B, Hq, M, Dv] in the dtype of query, 0 for a query that sees nothing, and lse [B, Hq, M] float32 (float64
        if query is), -inf there.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes, devices, formats or head counts that do not fit, an empty tensor, scale or softcap <= 0,
            key_start or key_end out of range, a tensor that requires a gradient (the op has none).
    """
    check_call(query=query, key_bias=key_bias, key_end=key_end, **pairs._asdict())
    *tensors, key_start = pairs
    out, lse = torch.ops.lookm.quantized_attention(query, *tensors, key_bias, key_start, key_end, scale, softcap)
    return out, lse


def _check(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    key_zero: Tensor | None,
    value: Tensor,
    value_scale: Tensor,
    value_zero: Tensor | None,
    key_bias: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> None:
    codes = tuple(CODES.values())
    packed = isinstance(key, Tensor) and key.dtype == CODES["int4"]
    channels = 2 if packed else 1
    check_attention(query, key, key_start, None, scale, softcap, FLOAT_DTYPES, False, codes, channels)
    check_rows("value", value, "B H N Dv", codes)
    require(value.dtype == key.dtype, "value", f"{key.dtype} like `key`", value)
    require(value.shape[:3] == key.shape[:3], "value", f"[B, H, N, Dv] = {[*key.shape[:3]]} and Dv, like `key`", value)
    check_device("query", query, value=value)
    places, groups = key.shape[:3], len(channel_groups(2 * value.shape[3]))
    blocks = (*places[:2], blocks_of(places[2]), query.shape[3])
    _check_scales("key", query, key_scale, key_zero, blocks if packed else places, packed)
    _check_scales("value", query, value_scale, value_zero, (*places, groups) if packed else places, packed)
    check_row_positions("key_end", key_end, query)
    check_key_bias(key_bias, query, key)


def _check_scales(
    of: str, query: Tensor, scale: Tensor, zero: Tensor | None, shape: Sequence[int], packed: bool
) -> None:
    require((zero is not None) == packed, f"{of}_zero", "a tensor with codes of uint8, None with others", zero)
    dims = {"key": "B H N/64 D", "value": "B H N groups"}[of] if packed else "B H N"
    for argument, x in ((f"{of}_scale", scale), (f"{of}_zero", zero)):
        if x is not None:
            check_device("query", query, **{argument: x})
            check_tensor(argument, x, dims, FLOAT_DTYPES if packed else (torch.float32,))
            check_shape(argument, x, shape, dims)


def _run(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(query, key, *rest)
    key_scale, key_zero, value, value_scale, value_zero, key_bias, key_start, key_end, scale, softcap = rest
    check_inside("key_start", key_start, key.shape[2])
    check_inside("key_end", key_end, key.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = query, key, key_scale, key_zero, value, value_scale, value_zero
    # the first tensor's width is the head dimension that a backend must take
    widest = query[..., :1].expand(-1, -1, -1, max(query.shape[3], _value_width(value)))
    run = implementation("quantized_attention", "quantized_attention", widest, *tensors)
    out, lse = run(*tensors, key_bias, key_start, key_end, scale, softcap)
    return out, lse


def _value_width(value: Tensor) -> int:
    return value.shape[3] * (2 if value.dtype == CODES["int4"] else 1)


def _fake(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _check(query, key, *rest)
    out = query.new_empty((*query.shape[:3], _value_width(rest[2])))
    return out, query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))


register(
    "quantized_attention(Tensor query, Tensor key, Tensor key_scale, Tensor? key_zero, Tensor value, "
    "Tensor value_scale, Tensor? value_zero, Tensor? key_bias, Tensor? key_start, Tensor? key_end, float? scale, "
    "float? softcap) -> (Tensor, Tensor)",
    _run,
    _fake,
)
