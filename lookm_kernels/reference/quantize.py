"""Quantisation in float32, some tokens of a row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lookm_kernels._checks import accumulation_dtype
from lookm_kernels._formats import BLOCK, CODES, LARGEST, LEAST_STEP, blocks_of, channel_groups
from lookm_kernels.reference._blocks import rows_per_block


def quantize_pairs(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, format: str, of_keys: bool, key_start: Tensor | None
) -> None:
    """Keys or values x [B, H, N, D] into codes, scale and zero; see lookm_kernels.quantize_pairs."""
    batch, heads, tokens, width = x.shape
    size = max(BLOCK, rows_per_block(heads * width) // BLOCK * BLOCK)
    starts = [0] * batch if key_start is None else key_start.tolist()
    for row, start in enumerate(starts):
        for begin in range(start, tokens, size):
            places = slice(begin, min(begin + size, tokens))
            part = x[row, :, places].to(accumulation_dtype(x.dtype))
            if format != "int4":
                codes[row, :, places], scale[row, :, places] = _symmetric(part, format)
            elif of_keys:
                blocks = slice((begin - start) // BLOCK, blocks_of(places.stop - start))
                found = _by_channel(part, scale.dtype)
                codes[row, :, places], scale[row, :, blocks], zero[row, :, blocks] = found
            else:
                codes[row, :, places], scale[row, :, places], zero[row, :, places] = _by_group(part, scale.dtype)


def _symmetric(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """x [H, N, D] -> codes [H, N, D], scale [H, N]."""
    largest = x.abs().amax(-1)
    scale = (largest / LARGEST[format]).float().clamp(min=LEAST_STEP[torch.float32])
    scale.masked_fill_(~scale.isfinite(), float("nan"))
    steps = x / scale[..., None]
    steps = steps.round() if format == "int8" else steps.float()
    return steps.nan_to_num(0.0).to(CODES[format]), scale


def _by_channel(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [H, N, D] -> codes [H, N, D / 2], scale and zero [H, N / 64, D]."""
    heads, tokens, width = x.shape
    # the last token again and again changes neither the least nor the largest of its block
    place = torch.arange(blocks_of(tokens) * BLOCK, dtype=torch.long, device=x.device).clamp(max=tokens - 1)
    steps, scale, zero = _affine(x[:, place].view(heads, -1, BLOCK, width), 2, dtype)
    return _packed(steps.view(heads, -1, width)[:, :tokens]), scale[:, :, 0], zero[:, :, 0]


def _by_group(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [H, N, Dv] -> codes [H, N, Dv / 2], scale and zero [H, N, groups]."""
    found = [_affine(x[..., group], -1, dtype) for group in channel_groups(x.shape[2])]
    steps, scale, zero = (torch.cat(each, -1) for each in zip(*found, strict=True))
    return _packed(steps), scale, zero


def _affine(x: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Steps (uint8, as x), scale and zero of that dtype; what shares them lies along `dim`."""
    least, largest = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    extent = largest - least
    bad = ~extent.isfinite()
    scale = (extent / LARGEST["int4"]).clamp(min=LEAST_STEP[dtype]).masked_fill(bad, float("nan")).to(dtype)
    steps = ((x - least) / scale.to(x.dtype)).round().clamp(0, LARGEST["int4"])
    return steps.nan_to_num(0.0).to(torch.uint8), scale, least.masked_fill(bad, float("nan")).to(dtype)


def _packed(steps: Tensor) -> Tensor:
    """Two codes a byte: the channels of the first half in the low bits."""
    low, high = steps.chunk(2, -1)
    return low | (high << 4)
