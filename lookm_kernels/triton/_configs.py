"""Block sizes: what a configuration is, and how head sizes are padded to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def block_and_row(blocks):
    """This program's block and its (row, head) as int64: one grid axis, as the others end at 65,535 programs."""
    return tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)


class Config(NamedTuple):
    """Rows and columns of a tile, warps of a program, stages of the software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


def padded_width(width: int) -> int:
    """Head dimension rounded up to a power of two that the matrix units take."""
    return max(16, 1 << (width - 1).bit_length())


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Bytes of a padded row, at least 128: what the tables of configurations are keyed by, up to 2048."""
    return max(128, padded_width(width) * dtype.itemsize)
