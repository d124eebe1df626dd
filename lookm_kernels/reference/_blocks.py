"""Block sizes that bound the memory of a row's temporaries."""

from __future__ import annotations

BLOCK_ELEMENTS = 1 << 23


def rows_per_block(elements_per_row: int) -> int:
    """How many rows of that many elements make one block of at most BLOCK_ELEMENTS (32 MiB of float32)."""
    return max(1, BLOCK_ELEMENTS // elements_per_row)
