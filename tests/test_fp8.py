"""quantize_heads: 8-bit floats with one scale a head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import LAYOUTS, laid_out, random, same_bits

from lookm_kernels import quantize_heads

LARGEST = 448.0


@given(
    size=st.floats(-6, 4),
    seed=st.integers(0, 2**31),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_each_element_is_rounded_once(
    device: torch.device, size: float, seed: int, layout: str, dtype: torch.dtype
) -> None:
    x = laid_out((random(seed, 2, 3, 17, 5, device=device) * 10**size).to(dtype), layout)
    quantized, scale = quantize_heads(x)
    assert quantized.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert bool((torch.frexp(scale).mantissa == 0.5).all())
    exact = x.double() / scale[:, :, None, None]
    error = (quantized.double() - exact).abs()
    # half a unit in the last place: of 3 bits, or of the smallest number
    assert bool((error <= (exact.abs() / 16).clamp(min=2.0**-10)).all())
    largest = exact.abs().amax((2, 3))
    assert bool((largest <= LARGEST).all())
    assert size < -1 or bool((largest >= LARGEST / 2).all())


def test_padding_sets_no_scale_and_other_rows_change_no_bit(device: torch.device) -> None:
    x = random(0, 2, 3, 9, 4, device=device)
    x[1, :, :4] = 1e6
    quantized, scale = quantize_heads(x, torch.tensor([0, 4], dtype=torch.int32, device=device))
    alone, alone_scale = quantize_heads(x[1:, :, 4:].contiguous())
    assert same_bits(quantized[1:, :, 4:], alone)
    assert same_bits(scale[1:], alone_scale)
    assert bool((quantized[1, :, :4].float() == 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_element_stays_visible_and_in_its_head(device: torch.device, bad: float) -> None:
    x = random(0, 1, 2, 9, 4, device=device)
    clean, clean_scale = quantize_heads(x)
    x[0, 1, 3, 2] = bad
    quantized, scale = quantize_heads(x)
    assert bool(scale[0, 1].isnan())
    assert same_bits(quantized[0, 0], clean[0, 0])
    assert same_bits(scale[:, :1], clean_scale[:, :1])


def test_zeros(device: torch.device) -> None:
    quantized, scale = quantize_heads(torch.zeros(1, 1, 3, 4, device=device))
    assert not quantized.float().any()
    assert bool((scale > 0).all())


@pytest.mark.parametrize(
    ("x", "start", "error", "message"),
    [
        ([1.0], None, TypeError, "`x` must be a tensor, got list"),
        (torch.zeros(1, 1, 3, 4, dtype=torch.float64), None, TypeError, "`x` must be float16 or bfloat16 or float32"),
        (torch.zeros(3, 4), None, ValueError, r"`x` must be \[B, H, N, D\]"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(1, dtype=torch.int32), ValueError, r"`start` must be \[B\] = \[2\]"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(2), TypeError, "`start` must be int32"),
        (torch.zeros(1, 1, 3, 4, requires_grad=True), None, ValueError, "`x` must not require a gradient"),
    ],
)
def test_bad_input(x: object, start: torch.Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_heads(x, start)
