"""Merging: evicted tokens sorted by pivot, fixed tiles of that order summed, then one warp a pivot: csrc/merge.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm_kernels import _native


def merge_(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    evicted: Tensor,
    pivot: Tensor,
    evicted_weight: Tensor,
    kept_weight: Tensor,
    votes: Tensor | None = None,
    out_votes: Tensor | None = None,
    out_key: Tensor | None = None,
    out_value: Tensor | None = None,
) -> None:
    """See lookm_kernels.merge_."""
    batch, heads, tokens, width = key.shape
    kept_size, evicted_size = kept.shape[2], evicted.shape[2]
    if kept_size == 0:
        return
    sizes = batch, heads, kept_size, evicted_size, width, value.shape[3]
    workspace_bytes = _native.call("merge_workspace", *sizes)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=key.device)
    lists = [x.contiguous() for x in (kept, evicted, pivot, evicted_weight, kept_weight)]
    # 0: none are given, or wanted
    given = None if votes is None else votes.contiguous()
    counted = [0 if x is None else x.data_ptr() for x in (given, out_votes)]
    outs = (key, value) if out_key is None or out_value is None else (out_key, out_value)
    _native.call(
        "merge", *(_native.rows(x) for x in (key, value, *outs)), *(x.data_ptr() for x in lists), *counted, batch,
        heads, tokens, kept_size, evicted_size, workspace.data_ptr(), workspace_bytes, _native.stream(key.device),
    )  # fmt: skip
