"""merge_: evicted keys and values fold into their pivots."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm_kernels._checks import (
    accumulation_dtype,
    check_ascending,
    check_call,
    check_device,
    check_in_place,
    check_indices,
    check_rows,
    check_shape,
    check_tensor,
    require,
)
from lookm_kernels._dispatch import implementation, register
from lookm_kernels.nearest import check_lists


def merge_(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    evicted: Tensor,
    pivot: Tensor,
    evicted_weight: Tensor,
    kept_weight: Tensor,
) -> None:
    """Merge evicted tokens into kept ones, in place, keys and values alike (LOOK-M, section 3.3).

        x_c <- kept_weight[c] * x_c + sum over the e with pivot c of evicted_weight[e] * x_e

    Accumulated in float32 (float64 for a float64 tensor) in the order of the evicted list and rounded once, to the
    tensor's own dtype. Only the rows of kept tokens are written, and of those only the ones that change; a token of
    weight 0 is not read.

    Args:
        key, value: [B, H, N, D] and [B, H, N, Dv] float16, bfloat16, float32 or float64, modified; they may differ in
            dtype, as under torch.autocast.
        kept, evicted: [B, H, K] and [B, H, E] int32 as select_tokens gives them; -1 marks an empty place.
        pivot: [B, H, E] int32, places in `kept` as nearest_kept gives them; -1 merges nowhere.
        evicted_weight, kept_weight: [B, H, E] and [B, H, K] float32 (float64 for float64 keys); see
            rules.merge_weights.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes or devices that do not fit, indices out of range, an expanded key or value, an input that
            requires a gradient. Nothing is modified then.
    """
    check_call(key=key, value=value, kept=kept, evicted=evicted, pivot=pivot)
    check_call(evicted_weight=evicted_weight, kept_weight=kept_weight)
    torch.ops.lookm.merge_(key, value, kept, evicted, pivot, evicted_weight, kept_weight)


def check_apart(key: Tensor, value: Tensor) -> None:
    """Key and value must not be one tensor: what is moved in one would move twice."""
    require(key.data_ptr() != value.data_ptr(), "value", "in other memory than `key`, as both are modified", value)


def check_key_value(key: Tensor, value: Tensor) -> None:
    """A key and a value tensor of one cache layer that are about to be modified."""
    check_rows("key", key, "B H N D")
    check_rows("value", value, "B H N Dv")
    require(value.shape[:3] == key.shape[:3], "value", f"[B, H, N] = {list(key.shape[:3])} like `key`", value)
    check_device("key", key, value=value)
    check_in_place("key", key)
    check_in_place("value", value)


def _check(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    evicted: Tensor,
    pivot: Tensor,
    evicted_weight: Tensor,
    kept_weight: Tensor,
) -> None:
    check_key_value(key, value)
    check_lists(key, kept=kept, evicted=evicted, pivot=pivot)
    check_shape("pivot", pivot, evicted.shape, "B H E")
    for argument, weight, dims, shape in (
        ("evicted_weight", evicted_weight, "B H E", evicted.shape),
        ("kept_weight", kept_weight, "B H K", kept.shape),
    ):
        check_tensor(argument, weight, dims, (accumulation_dtype(key.dtype),))
        check_shape(argument, weight, shape, dims)
    check_device("key", key, evicted_weight=evicted_weight, kept_weight=kept_weight)


def _run(key: Tensor, value: Tensor, kept: Tensor, evicted: Tensor, pivot: Tensor, *weights: Tensor) -> None:
    _check(key, value, kept, evicted, pivot, *weights)
    check_apart(key, value)
    check_indices("kept", kept, key.shape[2])
    check_ascending("kept", kept)
    check_indices("evicted", evicted, key.shape[2])
    check_indices("pivot", pivot, kept.shape[2])
    implementation("merge_", "merge", key, value)(key, value, kept, evicted, pivot, *weights)


register(
    "merge_(Tensor(a!) key, Tensor(b!) value, Tensor kept, Tensor evicted, Tensor pivot, Tensor evicted_weight, "
    "Tensor kept_weight) -> ()",
    _run,
    _check,
)
