"""Compaction in place: a block walks one (row, head) and a slab of its bytes: csrc/compact.cu."""

from __future__ import annotations

from torch import Tensor

from lookm_kernels import _native


def compact_(key: Tensor, value: Tensor, kept: Tensor) -> None:
    """See lookm_kernels.compact_."""
    batch, heads, tokens, _ = key.shape
    kept = kept.contiguous()
    _native.call(
        "compact", _native.rows(key), _native.rows(value), kept.data_ptr(), batch, heads, tokens, kept.shape[2],
        _native.stream(key.device),
    )  # fmt: skip
