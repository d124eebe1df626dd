"""The formats of quantised pairs: what their codes are, and which numbers share a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm_kernels._checks import FP8

# dtype of the codes, by which a format is known, and the largest code
CODES = {"int8": torch.int8, "fp8": FP8, "int4": torch.uint8}
LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 15.0}
# int4: tokens of a block of keys, and most channels of a group of values
BLOCK = 64
# 4-bit codes less this are as often below 0 as above: what is rounded after them is smaller
CENTRE = 8
# The least step. float16 rounds smaller ones so much that 15 of them no longer span what they must; the others hold
# anything that is not subnormal.
LEAST_STEP = {
    torch.float16: 2.0**-20,
    torch.bfloat16: 2.0**-126,
    torch.float32: 2.0**-126,
    torch.float64: 2.0**-126,
}


def format_of(codes: Tensor) -> str:
    """The format whose codes these are."""
    return next(name for name, dtype in CODES.items() if dtype == codes.dtype)


def blocks_of(tokens: int) -> int:
    """How many blocks of BLOCK tokens hold all."""
    return -(-tokens // BLOCK)


def channel_groups(width: int) -> list[slice]:
    """The channels of every group of int4 values: at most BLOCK each, and none in both halves of a head.

    A byte holds channel d in its low and channel d + width / 2 in its high half.
    """
    half = width // 2
    return [slice(at, min(at + BLOCK, end)) for end in (half, width) for at in range(end - half, end, BLOCK)]


def new_codes(x: Tensor, format: str, of_keys: bool, filled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero) for keys or values x [B, H, N, D], filled with 0 or not; see QuantizedPairs.

    zero is empty in a format that is symmetric.
    """
    batch, heads, tokens, width = x.shape
    new = x.new_zeros if filled else x.new_empty
    if format != "int4":
        codes = new(x.shape, dtype=CODES[format])
        return codes, new(x.shape[:3], dtype=torch.float32), new((0,), dtype=torch.float32)
    shape = (blocks_of(tokens), width) if of_keys else (tokens, 2 * blocks_of(width // 2))
    scale, zero = (new((batch, heads, *shape)) for _ in range(2))
    return new((batch, heads, tokens, width // 2), dtype=torch.uint8), scale, zero
