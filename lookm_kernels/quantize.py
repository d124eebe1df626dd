"""quantize_pairs: keys and values in 8 or 4 bits, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lookm_kernels._checks import (
    check_call,
    check_device,
    check_inside,
    check_row_positions,
    check_rows,
    check_tensors,
    require,
)
from lookm_kernels._dispatch import implementation, register
from lookm_kernels._formats import BLOCK, CODES, channel_groups, format_of, new_codes


class QuantizedPairs(NamedTuple):
    """Keys and values in few bits, as quantize_pairs makes them and quantized_attention reads them.

    key: int8 or float8_e4m3fn [B, H, N, D]; for "int4" uint8 [B, H, N, D / 2], two codes from 0 to 15 a byte: channel d
        in the low half, channel d + D / 2 in the high one.
    key_scale: float32 [B, H, N], one a token; for "int4" [B, H, ceil(N / 64), D] of the keys' dtype, one a channel and
        block of 64 tokens, counted from key_start (as in KIVI, arXiv 2402.02750: some channels of keys are far off 0).
    key_zero: None; for "int4" like key_scale, what code 0 stands for.
    value: like key, with Dv.
    value_scale: float32 [B, H, N]; for "int4" [B, H, N, 2 ceil(Dv / 128)] of the values' dtype: first for the channels
        of the low half in groups of 64 (the last may be smaller), then for those of the high half.
    value_zero: None; for "int4" like value_scale.
    key_start: int32 [B], the first place of each row that holds a pair; None: all do.

    x = scale * code, for "int4" zero + scale * code.
    """

    key: Tensor
    key_scale: Tensor
    key_zero: Tensor | None
    value: Tensor
    value_scale: Tensor
    value_zero: Tensor | None
    key_start: Tensor | None = None

    @property
    def format(self) -> str:
        """ "int8", "fp8" or "int4": what the dtype of the codes says."""
        return format_of(self.key)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self if x is not None)


def quantize_pairs(
    key: Tensor, value: Tensor, format: str = "int8", *, key_start: Tensor | None = None
) -> QuantizedPairs:
    """Keys and values in 8 or 4 bits, each number to half a step of its scale.

        "int8"  one scale a token and head: the largest of it is 127 steps
        "fp8"   the same with float8_e4m3fn, whose steps are a sixteenth of a number or less: the largest is 448
        "int4"  16 steps from the least to the largest of a group: 64 channels of a value; 64 tokens of a key's channel

    Of 4 D bytes of a pair in 16 bits 2 D + 8 are left, or D + 16 in "int4". A group of equal numbers, zeros too, is
    exact in "int4". A group with a NaN, an infinity or a range that float32 does not hold has a scale (and zero) of NaN
    and codes of 0: what reads it becomes NaN.

    Args:
        key, value: [B, H, N, D] and [B, H, N, Dv] float16, bfloat16, float32 or float64; they may differ in dtype.
        format: "int8", "fp8" or "int4", which needs an even D and Dv.
        key_start: [B] int32, first position of each row that is not padding. Padding belongs to no group; its codes are
            0, and so are the scales that nothing uses.

    Raises:
        TypeError: not a tensor, or a dtype that is not accepted.
        ValueError: shapes or devices that do not fit, an unknown format, an odd width for "int4", key_start out of
            range, an empty tensor, a tensor that requires a gradient.
    """
    check_call(key=key, value=value, key_start=key_start)
    tensors = torch.ops.lookm.quantize_pairs(key, value, format, key_start)
    codes, scale, zero, value_codes, value_scale, value_zero = tensors
    if format != "int4":
        return QuantizedPairs(codes, scale, None, value_codes, value_scale, None, key_start)
    return QuantizedPairs(codes, scale, zero, value_codes, value_scale, value_zero, key_start)


def dequantize_pairs(pairs: QuantizedPairs, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The keys [B, H, N, D] and values [B, H, N, Dv] that quantised pairs stand for, all at once; 0 at padding.

    Computed in float32, or float64 for that dtype, and rounded to the dtype.

    Raises:
        TypeError: codes or scales that are not tensors.
    """
    check_tensors(**pairs._asdict())
    exact = torch.promote_types(dtype, torch.float32)
    tokens, device = pairs.key.shape[2], pairs.key.device
    place = torch.arange(tokens, device=device).expand(pairs.key.shape[0], -1)
    place = place if pairs.key_start is None else place - pairs.key_start[:, None]
    padding = (place < 0)[:, None, :, None]

    def restored(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        if zero is None:
            x = codes.to(exact) * scale.to(exact)[..., None]
        else:
            x = torch.cat((codes & 15, codes >> 4), -1).to(exact) * scale.to(exact) + zero.to(exact)
        return x.masked_fill(padding, 0.0).to(dtype)

    key_scale, key_zero, value_scale, value_zero = pairs.key_scale, pairs.key_zero, pairs.value_scale, pairs.value_zero
    if key_zero is not None and value_zero is not None:
        block = (place.clamp(min=0) // BLOCK)[:, None, :, None]
        groups = channel_groups(2 * pairs.value.shape[3])
        sizes = torch.tensor([group.stop - group.start for group in groups], device=device)
        group = torch.arange(len(groups), device=device).repeat_interleave(sizes, output_size=2 * pairs.value.shape[3])
        key_scale, key_zero = (x.take_along_dim(block, 2) for x in (key_scale, key_zero))
        value_scale, value_zero = (x[..., group] for x in (value_scale, value_zero))
    return restored(pairs.key, key_scale, key_zero), restored(pairs.value, value_scale, value_zero)


def _check(key: Tensor, value: Tensor, format: str, key_start: Tensor | None) -> None:
    check_rows("key", key, "B H N D")
    check_rows("value", value, "B H N Dv")
    require(value.shape[:3] == key.shape[:3], "value", f"[B, H, N] = {[*key.shape[:3]]} like `key`", value)
    check_device("key", key, value=value)
    check_row_positions("key_start", key_start, key, "key")
    require(format in CODES, "format", f"one of {list(CODES)}", format)
    for argument, x in (("key", key), ("value", value)):
        require(format != "int4" or x.shape[3] % 2 == 0, argument, "of an even width for int4", x)


def _run(key: Tensor, value: Tensor, format: str, key_start: Tensor | None) -> list[Tensor]:
    _check(key, value, format, key_start)
    check_inside("key_start", key_start, key.shape[2])
    widest = max(key, value, key=lambda x: x.shape[3])
    outs = _fake(key, value, format, key_start)
    run = implementation("quantize_pairs", "quantize", widest, key, value)
    for of_keys, x, (codes, scale, zero) in ((True, key, outs[:3]), (False, value, outs[3:])):
        run(x, codes, scale, zero, format, of_keys, key_start)
    return outs


def _fake(key: Tensor, value: Tensor, format: str, key_start: Tensor | None) -> list[Tensor]:
    """What padding leaves unwritten is 0."""
    _check(key, value, format, key_start)
    return [
        out
        for x, of_keys in ((key, True), (value, False))
        for out in new_codes(x, format, of_keys, filled=key_start is not None)
    ]


register(
    "quantize_pairs(Tensor key, Tensor value, str format, Tensor? key_start) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
