"""nearest_kept: the pivot of every evicted token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lookm_kernels._checks import (
    accumulation_dtype,
    check_call,
    check_device,
    check_indices,
    check_rows,
    check_shape,
    check_tensor,
    check_unit_stride,
    require,
)
from lookm_kernels._dispatch import implementation, register


def nearest_kept(
    key: Tensor,
    kept: Tensor,
    evicted: Tensor,
    *,
    value: Tensor | None = None,
    group: Tensor | None = None,
    min_similarity: float | Tensor | None = None,
    kept_key: Tensor | None = None,
    kept_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kept token whose key points the same way (LOOK-M, section 3.3).

        pivot[e] = argmax over kept c of cos(k_e, k_c), ties to the lower index

    Keys that are equal tie; of keys that only point the same way the rounded cosines decide. A zero-norm key has cosine
    0 with every key; a cosine that is not a number counts as 0. The E x K matrix of cosines is never held as a whole.

    Args:
        key: [B, H, N, D], as cached (float16, bfloat16, float32 or float64).
        kept: [B, H, K] int32 and
        evicted: [B, H, E] int32, token indices, -1 for an empty place; as select_tokens gives them.
        value: [B, H, N, Dv] of key's dtype: the mean of the cosines of keys and of values decides; None: keys alone.
        group: [B, N] int32: only kept tokens of the evicted token's group can be its pivot; None: all can.
        min_similarity: a number, or [B, H] of the similarity's dtype: a token whose best similarity is below has no
            pivot; None: any will do.
        kept_key, kept_value: [B, H, K, D] and [B, H, K, Dv] of the dtypes of key and value, compared with instead of
            the kept rows: what was merged into them in an earlier round. kept_value goes with value.

    Returns:
        pivot [B, H, E] int32, a place in the list `kept` (0 to K - 1), and similarity [B, H, E] float32 (float64 for
        float64 keys). An empty place, a token without a pivot, and a row that keeps nothing have pivot -1 and
        similarity 0.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes or devices that do not fit, an empty key, indices out of range, a key that requires a
            gradient.
    """
    check_call(key=key, kept=kept, evicted=evicted, value=value, group=group, kept_key=kept_key, kept_value=kept_value)
    least = as_heads(key, min_similarity)
    return torch.ops.lookm.nearest_kept(key, kept, evicted, value, group, least, kept_key, kept_value)  # type: ignore[no-any-return]


def as_heads(key: Tensor, min_similarity: float | Tensor | None) -> Tensor | None:
    """min_similarity as a tensor [B, H], filled on the device of key [B, H, N, D]."""
    if min_similarity is None:
        return None
    if isinstance(min_similarity, Tensor):
        check_call(min_similarity=min_similarity)
        return min_similarity
    if not isinstance(min_similarity, (int, float)) or isinstance(min_similarity, bool):
        came = type(min_similarity).__name__
        raise TypeError(f"`min_similarity` must be None, a number or a tensor [B, H], got {came}")
    require(not math.isnan(min_similarity), "min_similarity", "a number", min_similarity)
    check_rows("key", key, "B H N D")
    return key.new_full(key.shape[:2], float(min_similarity), dtype=accumulation_dtype(key.dtype))


def check_lists(key: Tensor, **lists: Tensor) -> None:
    """Index lists [B, H, any] that belong to `key`."""
    for argument, indices in lists.items():
        check_tensor(argument, indices, "B H K" if argument == "kept" else "B H E", (torch.int32,))
        fits = indices.shape[:2] == key.shape[:2] and indices.shape[2] <= key.shape[2]
        require(fits, argument, f"[{key.shape[0]}, {key.shape[1]}, at most {key.shape[2]}] like `key`", indices)
    check_device("key", key, **lists)


def check_group(key: Tensor, group: Tensor | None, min_similarity: Tensor | None) -> None:
    """Who may merge into whom: group [B, N] and min_similarity [B, H] of `key`; None is right too."""
    if group is not None:
        check_tensor("group", group, "B N", (torch.int32,))
        check_shape("group", group, (key.shape[0], key.shape[2]), "B N")
        check_device("key", key, group=group)
    if min_similarity is not None:
        check_tensor("min_similarity", min_similarity, "B H", (accumulation_dtype(key.dtype),))
        check_shape("min_similarity", min_similarity, key.shape[:2], "B H")
        check_device("key", key, min_similarity=min_similarity)


def _check(
    key: Tensor,
    kept: Tensor,
    evicted: Tensor,
    value: Tensor | None,
    group: Tensor | None,
    min_similarity: Tensor | None,
    kept_key: Tensor | None,
    kept_value: Tensor | None,
) -> None:
    check_rows("key", key, "B H N D")
    check_lists(key, kept=kept, evicted=evicted)
    check_group(key, group, min_similarity)
    if value is not None:
        check_rows("value", value, "B H N Dv")
        require(value.shape[:3] == key.shape[:3], "value", f"[B, H, N] = {list(key.shape[:3])} like `key`", value)
        check_device("key", key, value=value)
    require(kept_value is None or value is not None, "kept_value", "None where `value` is None", kept_value)
    for argument, rows, of in (("kept_key", kept_key, key), ("kept_value", kept_value, value)):
        if rows is not None and of is not None:
            check_tensor(argument, rows, "B H K D", (of.dtype,))
            check_shape(argument, rows, (*kept.shape, of.shape[3]), "B H K D")
            check_unit_stride(argument, rows)
            check_device("key", key, **{argument: rows})


def _run(key: Tensor, kept: Tensor, evicted: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(key, kept, evicted, *rest)
    check_indices("kept", kept, key.shape[2])
    check_indices("evicted", evicted, key.shape[2])
    return implementation("nearest_kept", "nearest", key, rest[0])(key, kept, evicted, *rest)  # type: ignore[no-any-return]


def _fake(key: Tensor, kept: Tensor, evicted: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(key, kept, evicted, *rest)
    return torch.empty_like(evicted), key.new_empty(evicted.shape, dtype=accumulation_dtype(key.dtype))


register(
    "nearest_kept(Tensor key, Tensor kept, Tensor evicted, Tensor? value, Tensor? group, Tensor? min_similarity, "
    "Tensor? kept_key, Tensor? kept_value) -> (Tensor, Tensor)",
    _run,
    _fake,
)
