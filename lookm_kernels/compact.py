"""compact_: kept tokens move to the front."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm_kernels._checks import check_ascending, check_call, check_indices
from lookm_kernels._dispatch import implementation, register_in_place
from lookm_kernels.merge import check_apart, check_key_value, check_outs, given_outs
from lookm_kernels.nearest import check_lists


def compact_(
    key: Tensor, value: Tensor, kept: Tensor, *, out_key: Tensor | None = None, out_value: Tensor | None = None
) -> None:
    """Move the kept tokens of every (row, head) to rows 0 to K - 1, in order, in place.

        x[i] <- x[kept[i]],  0 where kept[i] is -1

    Rows K to N - 1 are left as they are. With out_key and out_value, key and value are only read, and those hold the K
    rows afterwards.

    Args:
        key, value: [B, H, N, D] and [B, H, N, Dv] float16, bfloat16, float32 or float64, modified without outs; they
            may differ in dtype.
        kept: [B, H, K] int32, ascending, empty places (-1) first, as select_tokens gives it.
        out_key, out_value: see merge_.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes or devices that do not fit, indices out of range or not ascending, an expanded tensor that
            would be modified, outs that merge_ refuses, an input that requires a gradient. Nothing is modified then.
    """
    check_call(key=key, value=value, kept=kept)
    torch.ops.lookm.compact_(key, value, kept, *given_outs(out_key, out_value))


def _check(key: Tensor, value: Tensor, kept: Tensor, *outs: Tensor) -> None:
    check_key_value(key, value, outs)
    check_lists(key, kept=kept)
    check_outs(key, value, kept.shape[2], outs)


def _run(key: Tensor, value: Tensor, kept: Tensor, *outs: Tensor) -> None:
    _check(key, value, kept, *outs)
    check_apart(key, value, *outs)
    check_indices("kept", kept, key.shape[2])
    check_ascending("kept", kept)
    implementation("compact_", "compact", key, value)(key, value, kept, *outs)


register_in_place("compact_", "Tensor kept", "()", _run, _check)
