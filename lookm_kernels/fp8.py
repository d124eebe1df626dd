"""quantize_heads: queries and keys as 8-bit floats for cheaper attention scores."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm_kernels._checks import FP8, check_call, check_device, check_rows, check_shape, check_tensor

SMALLEST_EXPONENT = -14  # of a normal float16


def quantize_heads(x: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A tensor as float8_e4m3fn with one scale a (row, head): x ~ quantized * scale, to 1/16 of each large element.

        scale = a power of two, 2 ** -14 or more, under which no element of the head exceeds 448, the largest float8

    A power of two makes the division exact, so each element is rounded once. For attention_scores, whose head_scale is
    the product of the query's and the key's scale.

    Args:
        x: [B, H, N, D] float16, bfloat16 or float32.
        start: [B] int32, the first token of each row that is not padding; padding becomes 0 and sets no scale.

    Returns:
        quantized [B, H, N, D] float8_e4m3fn and scale [B, H] float32, NaN for a head with a NaN or an infinity.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: an empty tensor, shapes or devices that do not fit, a tensor that requires a gradient.
    """
    check_call(x=x, start=start)
    check_rows("x", x, "B H N D", (torch.float16, torch.bfloat16, torch.float32))
    if start is not None:
        check_tensor("start", start, "B", (torch.int32,))
        check_shape("start", start, x.shape[:1], "B")
        check_device("x", x, start=start)
        padding = torch.arange(x.shape[2], dtype=torch.long, device=x.device) < start[:, None]
        x = x.masked_fill(padding[:, None, :, None], 0.0)
    largest = x.abs().amax((2, 3)).float()
    exponent = torch.frexp(largest / torch.finfo(FP8).max).exponent.clamp(min=SMALLEST_EXPONENT)
    scale = torch.ldexp(torch.ones_like(largest), exponent).where(largest.isfinite(), float("nan"))
    return (x / scale.to(x.dtype)[:, :, None, None]).to(FP8), scale
