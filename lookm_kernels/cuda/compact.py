"""Compaction: a block walks one (row, head) and a slab of its bytes: csrc/compact.cu."""

from __future__ import annotations

from torch import Tensor

from lookm_kernels import _native


def compact_(
    key: Tensor, value: Tensor, kept: Tensor, out_key: Tensor | None = None, out_value: Tensor | None = None
) -> None:
    """See lookm_kernels.compact_."""
    batch, heads, tokens, _ = key.shape
    kept = kept.contiguous()
    outs = (key, value) if out_key is None or out_value is None else (out_key, out_value)
    _native.call(
        "compact", *(_native.rows(x) for x in (key, value, *outs)), kept.data_ptr(), batch, heads, tokens,
        kept.shape[2], _native.stream(key.device),
    )  # fmt: skip
