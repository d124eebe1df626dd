"""nearest_kept: the pivot of every evicted token."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm_kernels._checks import (
    accumulation_dtype,
    check_call,
    check_device,
    check_indices,
    check_rows,
    check_tensor,
    require,
)
from lookm_kernels._dispatch import implementation, register


def nearest_kept(key: Tensor, kept: Tensor, evicted: Tensor) -> tuple[Tensor, Tensor]:
    """The kept token whose key points the same way (LOOK-M, section 3.3).

        pivot[e] = argmax over kept c of cos(k_e, k_c), ties to the lower index

    Keys that are equal tie; of keys that only point the same way the rounded cosines decide. A zero-norm key has cosine
    0 with every key; a cosine that is not a number counts as 0. The E x K matrix of cosines is never held as a whole.

    Args:
        key: [B, H, N, D], as cached (float16, bfloat16, float32 or float64).
        kept: [B, H, K] int32 and
        evicted: [B, H, E] int32, token indices, -1 for an empty place; as select_tokens gives them.

    Returns:
        pivot [B, H, E] int32, a place in the list `kept` (0 to K - 1), and similarity [B, H, E] float32 (float64 for
        float64 keys), its cosine. An empty place, or a row that keeps nothing, has pivot -1 and similarity 0.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes or devices that do not fit, an empty key, indices out of range, a key that requires a
            gradient.
    """
    check_call(key=key, kept=kept, evicted=evicted)
    return torch.ops.lookm.nearest_kept(key, kept, evicted)  # type: ignore[no-any-return]


def check_lists(key: Tensor, **lists: Tensor) -> None:
    """Index lists [B, H, any] that belong to `key`."""
    for argument, indices in lists.items():
        check_tensor(argument, indices, "B H K" if argument == "kept" else "B H E", (torch.int32,))
        fits = indices.shape[:2] == key.shape[:2] and indices.shape[2] <= key.shape[2]
        require(fits, argument, f"[{key.shape[0]}, {key.shape[1]}, at most {key.shape[2]}] like `key`", indices)
    check_device("key", key, **lists)


def _check(key: Tensor, kept: Tensor, evicted: Tensor) -> None:
    check_rows("key", key, "B H N D")
    check_lists(key, kept=kept, evicted=evicted)


def _run(key: Tensor, kept: Tensor, evicted: Tensor) -> tuple[Tensor, Tensor]:
    _check(key, kept, evicted)
    check_indices("kept", kept, key.shape[2])
    check_indices("evicted", evicted, key.shape[2])
    return implementation("nearest_kept", "nearest", key)(key, kept, evicted)  # type: ignore[no-any-return]


def _fake(key: Tensor, kept: Tensor, evicted: Tensor) -> tuple[Tensor, Tensor]:
    _check(key, kept, evicted)
    return torch.empty_like(evicted), key.new_empty(evicted.shape, dtype=accumulation_dtype(key.dtype))


register("nearest_kept(Tensor key, Tensor kept, Tensor evicted) -> (Tensor, Tensor)", _run, _fake)
