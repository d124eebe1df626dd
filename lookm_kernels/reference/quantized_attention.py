"""Attention over quantised pairs: their codes become numbers some tokens at a time, right before they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lookm_kernels._checks import FP8
from lookm_kernels._formats import BLOCK, CENTRE, blocks_of, channel_groups
from lookm_kernels.reference.kept_attention import Rows, attend_rows, product_of_parts, sum_of_parts, tokens_of_part


def quantized_attention(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    key_zero: Tensor | None,
    value: Tensor,
    value_scale: Tensor,
    value_zero: Tensor | None,
    key_bias: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See lookm_kernels.quantized_attention."""

    def read(row: int, start: int, end: int) -> tuple[Rows, Rows]:
        places = slice(start, end)
        codes = key[row, :, places], value[row, :, places]
        if key_zero is None or value_zero is None:
            return Scaled(codes[0], key_scale[row, :, places]), Scaled(codes[1], value_scale[row, :, places])
        # the blocks of keys are counted from the first of the row
        blocks = slice(blocks_of(end - start))
        return (
            Packed(codes[0], key_scale[row, :, blocks], key_zero[row, :, blocks]),
            Packed(codes[1], value_scale[row, :, places], value_zero[row, :, places]),
        )

    width = value.shape[3] * (1 if value_zero is None else 2)
    out = query.new_zeros((*query.shape[:3], width))
    return attend_rows(out, read, key.shape[2], query, key_bias, key_start, key_end, None, False, scale, softcap)


class Scaled(NamedTuple):
    """Codes [H, N, D] of 8 bits with a scale [H, N] a token, which multiplies logits and attention instead of them."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> Sequence[int]:
        return self.codes.shape

    def logits(self, query: Tensor, scale: float) -> Tensor:
        parts, factor = _numbers(self.codes, query.dtype)
        return product_of_parts(query, parts, scale * factor).mul_(self.scale[:, None])

    def weighted(self, attention: Tensor) -> Tensor:
        parts, factor = _numbers(self.codes, attention.dtype)
        return sum_of_parts(attention.mul_(self.scale[:, None]), parts, self.codes.shape[2]).mul_(factor)


def _numbers(codes: Tensor, dtype: torch.dtype) -> tuple[Iterator[Tensor], float]:
    """The codes in order, some at a time, and what they are to be multiplied by; each part is valid until the next."""
    if codes.dtype == FP8:
        return _float8(codes.view(torch.int8), dtype), 2.0**8
    return _integers(codes, dtype), 1.0


def _integers(codes: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    heads, tokens, width = codes.shape
    size = tokens_of_part(heads, tokens, width)
    buffer = codes.new_empty((heads, size, width), dtype=dtype)
    for part in torch.split(codes, size, 1):
        yield buffer[:, : part.shape[1]].copy_(part)


def _float8(codes: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The bits of finite float8_e4m3fn as numbers 2 ** -8 as large, as torch is much slower."""
    heads, tokens, width = codes.shape
    size = tokens_of_part(heads, tokens, width)
    buffer = codes.new_empty((heads, size, width), dtype=dtype)
    bits = codes.new_empty((heads, size, width), dtype=torch.int16)
    for part in torch.split(codes, size, 1):
        here = bits[:, : part.shape[1]].copy_(part)
        # exponent and fraction to where float16 has them, whose bias is 8 more; the sign is in the highest bit already
        here.bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
        yield buffer[:, : part.shape[1]].copy_(here.view(torch.float16))


class Packed(NamedTuple):
    """Codes [H, N, D / 2] of 4 bits, two a byte; of keys the scale and the zero are [H, N / 64, D], of values
    [H, N, groups]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def shape(self) -> Sequence[int]:
        return *self.codes.shape[:2], 2 * self.codes.shape[2]

    def logits(self, query: Tensor, scale: float) -> Tensor:
        return product_of_parts(query, _keys(self.codes, *self._centred(query.dtype)), scale)

    def weighted(self, attention: Tensor) -> Tensor:
        """Weights by group, as its scales are: fewer products than of the values."""
        scales, zeros = self._centred(attention.dtype)
        rest, groups = attention @ zeros, channel_groups(self.shape[2])
        sums = [
            rest[..., group, None].repeat(1, 1, channels.stop - channels.start) for group, channels in enumerate(groups)
        ]
        begin = 0
        for part in _nibbles(self.codes, attention.dtype):
            places = slice(begin, begin + part.shape[1])
            for group, channels in enumerate(groups):
                weights = attention[..., places] * scales[:, None, places, group]
                sums[group].baddbmm_(weights, part[..., channels])
            begin = places.stop
        return torch.cat(sums, -1)

    def _centred(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The scale, and what the code CENTRE stands for."""
        scale = self.scale.to(dtype)
        return scale, self.zero.to(dtype) + CENTRE * scale


def _keys(codes: Tensor, scale: Tensor, zero: Tensor) -> Iterator[Tensor]:
    heads, _, width = scale.shape
    begin = 0
    for part in _nibbles(codes, scale.dtype):
        blocks = slice(begin // BLOCK, blocks_of(begin + part.shape[1]))
        begin += part.shape[1]
        # what lies in the buffer behind the last token may be anything
        whole = part.as_strided(
            (heads, blocks.stop - blocks.start, BLOCK, width), (part.stride(0), BLOCK * width, width, 1)
        )
        torch.addcmul(zero[:, blocks, None], whole, scale[:, blocks, None], out=whole)
        yield part


def _nibbles(codes: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The codes less CENTRE, whole blocks at a time but for the last, all channels of a token beside each other."""
    heads, tokens, half = codes.shape
    size = blocks_of(tokens_of_part(heads, tokens, 2 * half)) * BLOCK
    buffer = codes.new_empty((heads, size, 2 * half), dtype=dtype)
    bits = codes.new_empty((heads, size, half))
    for part in torch.split(codes, size, 1):
        here, few = buffer[:, : part.shape[1]], bits[:, : part.shape[1]]
        # below 0 a byte wraps around
        here[..., :half].copy_(torch.bitwise_and(part, 15, out=few).sub_(CENTRE).view(torch.int8))
        here[..., half:].copy_(torch.bitwise_right_shift(part, 4, out=few).sub_(CENTRE).view(torch.int8))
        yield here
