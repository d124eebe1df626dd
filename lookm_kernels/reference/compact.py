"""Compaction through a copy of the kept rows."""

from __future__ import annotations

from torch import Tensor


def compact_(key: Tensor, value: Tensor, kept: Tensor) -> None:
    """See lookm_kernels.compact_."""
    place = kept.clamp(min=0).long()[..., None]
    for tensor in (key, value):
        rows = tensor.gather(2, place.expand(-1, -1, -1, tensor.shape[-1]))
        tensor[:, :, : kept.shape[-1]] = rows.masked_fill_((kept < 0)[..., None], 0.0)
