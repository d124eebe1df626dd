"""Compaction: the kept rows are gathered, into the outs or through a copy."""

from __future__ import annotations

import torch
from torch import Tensor


def compact_(
    key: Tensor, value: Tensor, kept: Tensor, out_key: Tensor | None = None, out_value: Tensor | None = None
) -> None:
    """See lookm_kernels.compact_."""
    place = kept.clamp(min=0).long()[..., None]
    for tensor, out in ((key, out_key), (value, out_value)):
        rows = torch.gather(tensor, 2, place.expand(-1, -1, -1, tensor.shape[-1]), out=out)
        rows.masked_fill_((kept < 0)[..., None], 0.0)
        if out is None:
            tensor[:, :, : kept.shape[-1]] = rows
