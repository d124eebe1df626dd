"""quantize_pairs: half a step at most, what shares a scale, the bytes, and what each number of a byte stands for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import INTERPRETED, LAYOUTS, LOW_PRECISION, laid_out, random, same_bits
from torch import Tensor

from lookm_kernels import QuantizedPairs, dequantize_pairs, quantize_pairs
from lookm_kernels._checks import FP8

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FORMATS = ["int8", "fp8", "int4"]
DTYPES = [*LOW_PRECISION, torch.float32]


def by_loops(pairs: QuantizedPairs, of_keys: bool) -> Tensor:
    """What the codes stand for in float64, number by number."""
    names = ("key", "key_scale", "key_zero") if of_keys else ("value", "value_scale", "value_zero")
    codes, scale, zero = (x if x is None else x.double().cpu() for x in (getattr(pairs, name) for name in names))
    starts = [0] * len(codes) if pairs.key_start is None else pairs.key_start.tolist()
    width = codes.shape[3] * (1 if zero is None else 2)
    half = codes.shape[3]
    out = torch.zeros(*codes.shape[:3], width, dtype=torch.float64)
    for b, h, n, c in torch.cartesian_prod(*(torch.arange(size) for size in out.shape)).tolist():
        if n < starts[b]:
            continue
        if zero is None:
            out[b, h, n, c] = codes[b, h, n, c] * scale[b, h, n]
            continue
        byte = int(codes[b, h, n, c % half])
        code = byte % 16 if c < half else byte // 16
        groups = scale.shape[3] // 2
        place = ((n - starts[b]) // 64, c) if of_keys else (n, (c % half) // 64 + groups * (c // half))
        out[b, h, n, c] = zero[b, h][place] + code * scale[b, h][place]
    return out


def visible(x: Tensor, start: Tensor | None) -> Tensor:
    """x [B, H, N, D] in float64 on the CPU, 0 at padding."""
    if start is None:
        return x.double().cpu()
    padding = torch.arange(x.shape[2]) < start.cpu()[:, None]
    return x.double().cpu().masked_fill(padding[:, None, :, None], 0.0)


def steps(pairs: QuantizedPairs, of_keys: bool) -> Tensor:
    """[B, H, N, D] half a step of each number's scale: what dequantize_pairs makes of scales with codes of 1."""
    codes, scale, zero = pairs[:3] if of_keys else pairs[3:6]
    ones = (
        torch.full_like(codes, 17) if zero is not None else torch.ones(codes.shape, device=codes.device).to(codes.dtype)
    )
    zero = zero if zero is None else torch.zeros_like(zero)
    unit = pairs._replace(**dict(zip(("key", "key_scale", "key_zero"), (ones, scale, zero), strict=True)))
    if not of_keys:
        unit = pairs._replace(value=ones, value_scale=scale, value_zero=zero)
    return dequantize_pairs(unit, torch.float64)[0 if of_keys else 1].cpu() / 2


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    batch, heads, tokens, seed = *(draw(st.integers(1, top)) for top in (2, 2, 150)), draw(st.integers(0, 2**31))
    format = draw(st.sampled_from(FORMATS))
    unit = 2 if format == "int4" else 1
    widths = [unit * draw(st.sampled_from([1, 4, 13, 40, 64, 65, 96])) for _ in range(2)]
    size, offset = 10 ** draw(st.floats(-6, 3)), draw(st.sampled_from([0.0, 3.0]))
    pairs = [
        size * (random(seed + place, batch, heads, tokens, width, dtype=torch.float64) + offset * random(seed, width))
        for place, width in enumerate(widths)
    ]
    starts = draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    start = starts if starts is None else torch.tensor(starts, dtype=torch.int32)
    return {"key": pairs[0], "value": pairs[1], "format": format, "key_start": start}


def run(call: dict[str, Any], device: torch.device, dtype: torch.dtype, layout: str = "contiguous") -> QuantizedPairs:
    start = call["key_start"]
    given = call | {name: laid_out(call[name].to(device, dtype), layout) for name in ("key", "value")}
    return quantize_pairs(**given | {"key_start": start if start is None else start.to(device)})


@given(call=calls(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_half_a_step(device: torch.device, call: dict[str, Any], dtype: torch.dtype, layout: str) -> None:
    """fp8 has a step for each number: a sixteenth of it, or 2 ** -9 of the scale."""
    pairs = run(call, device, dtype, layout)
    assert pairs.format == call["format"]
    for of_keys, found in zip((True, False), dequantize_pairs(pairs, torch.float64), strict=True):
        x = visible(call["key" if of_keys else "value"].to(dtype), call["key_start"])
        half = steps(pairs, of_keys)
        if pairs.format == "fp8":
            half = torch.maximum(x.abs() / 16, half * 2.0**-9)
        # the quotient is rounded too
        assert bool(((found.cpu() - x).abs() <= half * (1 + 1e-4) + x.abs() * 2e-7).all())


@given(call=calls())
def test_what_the_codes_stand_for(device: torch.device, call: dict[str, Any]) -> None:
    call |= {name: call[name][:, :, -70:, :20] for name in ("key", "value")}
    if call["key_start"] is not None:
        call["key_start"] = call["key_start"].clamp(max=call["key"].shape[2])
    pairs = run(call, device, torch.float32)
    for of_keys, found in zip((True, False), dequantize_pairs(pairs, torch.float64), strict=True):
        torch.testing.assert_close(found.cpu(), by_loops(pairs, of_keys), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(("format", "most"), [("int8", 0.516), ("fp8", 0.516), ("int4", 0.2813)])
def test_bytes(device: torch.device, format: str, most: float, dtype: torch.dtype) -> None:
    """Of 2 x 128 channels in 16 bits; a fifth of the pairs in int4 are 5.6 % of all."""
    x = random(0, 1, 2, 128, 128, dtype=dtype, device=device)
    pairs = quantize_pairs(x, x, format)
    assert most - 1e-3 <= pairs.nbytes / (2 * x.nbytes) <= most
    assert pairs.key.dtype == {"int8": torch.int8, "fp8": FP8, "int4": torch.uint8}[format]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_equal_numbers(device: torch.device, format: str, dtype: torch.dtype) -> None:
    """Zeros are exact in every format, any other number in int4, one that float16 or bfloat16 rounds too."""
    zeros = torch.zeros(1, 2, 70, 6, dtype=dtype, device=device)
    assert not any(bool(x.any()) for x in dequantize_pairs(quantize_pairs(zeros, zeros, format), torch.float64))
    for number in (1 / 3, -1e-5, 60000.0):
        same = torch.full_like(zeros, number)
        for x in dequantize_pairs(quantize_pairs(same, same, format), dtype):
            if format == "int4":
                assert torch.equal(x, same)
            torch.testing.assert_close(x, same, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("format", FORMATS)
def test_channels_far_from_zero(device: torch.device, format: str) -> None:
    """Keys have such: int4 rounds every channel by its own range, 8 bits by the largest of all."""
    key = random(0, 1, 2, 128, 16, device=device)
    key[..., 3] += 100
    found = dequantize_pairs(quantize_pairs(key, key, format))[0]
    error = (found - key).abs()[..., :3].max()
    assert error < 0.3 if format == "int4" else error > 0.1


@pytest.mark.parametrize("format", FORMATS)
def test_padding_and_the_batch_change_no_bit(device: torch.device, format: str) -> None:
    """Rows with paddings of several lengths, full of what would spoil a scale, and each alone without."""
    tokens, starts = 200, [0, 13, 199]
    key, value = (random(seed, 3, 2, tokens, width, device=device) for seed, width in ((0, 16), (1, 6)))
    for row, start in enumerate(starts):
        key[row, :, :start], value[row, :, :start] = math.nan, 1e30
    together = quantize_pairs(key, value, format, key_start=torch.tensor(starts, dtype=torch.int32, device=device))
    assert not any(x is not None and x.float().isnan().any() for x in together)
    for row, start in enumerate(starts):
        alone = quantize_pairs(key[row : row + 1, :, start:], value[row : row + 1, :, start:], format)
        for name, whole in together._asdict().items():
            single = getattr(alone, name)
            if single is None:
                continue
            of_blocks = format == "int4" and name in ("key_scale", "key_zero")
            own = whole[row : row + 1, :, : single.shape[2]] if of_blocks else whole[row : row + 1, :, start:]
            assert same_bits(own, single)
            rest = whole[row, :, single.shape[2] :] if of_blocks else whole[row, :, :start]
            assert not rest.float().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_a_bad_number_stays_visible_and_in_its_group(device: torch.device, format: str, bad: float) -> None:
    key, value = (random(seed, 1, 2, 130, 8, device=device) for seed in (0, 1))
    clean = dequantize_pairs(quantize_pairs(key, value, format))
    key[0, 1, 70, 2] = value[0, 1, 70, 2] = bad
    found = dequantize_pairs(quantize_pairs(key, value, format))
    of_key, of_value = (torch.zeros(1, 2, 130, 8, dtype=torch.bool, device=device) for _ in range(2))
    if format == "int4":
        of_key[0, 1, 64:128, 2] = of_value[0, 1, 70, :4] = True
    else:
        of_key[0, 1, 70] = of_value[0, 1, 70] = True
    for x, was, marked in zip(found, clean, (of_key, of_value), strict=True):
        assert torch.equal(x.isnan(), marked)
        assert torch.equal(x[~marked], was[~marked])


@pytest.mark.skipif(INTERPRETED, reason="float64 is the reference's alone")
@pytest.mark.parametrize("format", FORMATS)
def test_a_range_beyond_float32_is_not_silently_wrong(device: torch.device, format: str) -> None:
    key = torch.tensor([[[[1e300, -1e300]]]], dtype=torch.float64, device=device)
    for x in dequantize_pairs(quantize_pairs(key, key, format), torch.float64):
        assert bool(x.isnan().all()) or torch.equal(x, key)


@pytest.mark.parametrize("start", [None, torch.tensor([3, 0], dtype=torch.int32)], ids=["whole", "padded"])
def test_an_odd_width_in_8_bits(device: torch.device, start: Tensor | None) -> None:
    call = {"key": random(0, 2, 3, 9, 7), "value": random(1, 2, 3, 9, 5), "format": "int8", "key_start": start}
    for x, name in zip(dequantize_pairs(run(call, device, torch.float32)), ("key", "value"), strict=True):
        torch.testing.assert_close(x.cpu().double(), visible(call[name], start), rtol=0, atol=0.03)
