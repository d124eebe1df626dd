"""quantized_attention against torch's own attention in float64 over the pairs that the codes stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import EXACT, INTERPRETED, LOW_PRECISION, random, same_bits
from test_kept_attention import Largest, by_torch, log_sum_exp, rows
from torch import Tensor

from lookm_kernels import combine_attention, dequantize_pairs, kept_attention, quantize_pairs, quantized_attention
from lookm_kernels.reference import quantized_attention as reference
from lookm_kernels.reference._blocks import BLOCK_ELEMENTS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FORMATS = ["int8", "fp8", "int4"]
PAIRS = ("key", "value", "format", "key_start")


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes and options of one call on the CPU in float64, the bias in float32; with `format`."""
    batch, kv_heads, group = (draw(st.integers(1, top)) for top in (2, 2, 3))
    queries, tokens, seed = draw(st.integers(1, 5)), draw(st.integers(1, 150)), draw(st.integers(0, 2**31))
    call: dict[str, Any] = {"format": draw(st.sampled_from(FORMATS)), "causal": False}
    unit = 2 if call["format"] == "int4" else 1
    width, value_width = (unit * draw(st.sampled_from([1, 4, 13, 40, 65])) for _ in range(2))
    call |= rows(seed, batch, kv_heads * group, kv_heads, queries, tokens, width)
    call["key"] += 3 * random(seed + 6, 1, kv_heads, 1, width, dtype=torch.float64)
    call["value"] = random(seed + 3, batch, kv_heads, tokens, value_width, dtype=torch.float64)
    call["scale"] = draw(st.sampled_from([None, 0.5]))
    for name in ("key_start", "key_end"):
        places = draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        call[name] = places if places is None else torch.tensor(places, dtype=torch.int32)
    if draw(st.booleans()):
        bias = random(seed + 4, batch, kv_heads, draw(st.integers(0, tokens)))
        call["key_bias"] = bias.masked_fill(bias > draw(st.sampled_from([1.0, 9.0])), -math.inf)
    return call


def run(call: dict[str, Any], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Output and log-sum-exp on the CPU in float64, and the call with the pairs that the codes stand for."""
    own = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in call.items() if name != "causal"}
    own |= {name: own[name].to(dtype) for name in ("query", "key", "value")}
    pairs = quantize_pairs(**{name: own.pop(name) for name in PAIRS if name in own})
    key, value = dequantize_pairs(pairs, torch.float64)
    out, lse = quantized_attention(own.pop("query"), pairs, **own)
    assert out.dtype == dtype
    query = call["query"].to(dtype).double()
    return out.double().cpu(), lse.double().cpu(), call | {"query": query, "key": key.cpu(), "value": value.cpu()}


@given(call=calls(), dtype=st.sampled_from(EXACT))
def test_equals_torch_over_what_the_codes_stand_for(
    device: torch.device, call: dict[str, Any], dtype: torch.dtype
) -> None:
    out, lse, stored = run(call, device, dtype)
    tolerance = 3e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(out, by_torch(stored), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, log_sum_exp(stored), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32])
@pytest.mark.parametrize(("queries", "tokens", "width"), [(1, 17, 80), (1, 600, 128), (9, 507, 256), (30, 300, 64)])
@pytest.mark.parametrize("format", FORMATS)
def test_no_less_exact_than_torch(
    device: torch.device, format: str, queries: int, tokens: int, width: int, dtype: torch.dtype
) -> None:
    """Which gets the pairs rounded to that dtype: several splits, blocks and groups."""
    call = rows(queries + tokens, 2, 6, 2, queries, tokens, width) | {"format": format, "causal": False}
    call["key_start"] = torch.tensor([0, tokens // 3], dtype=torch.int32)
    call["key_bias"] = random(7, 2, 2, tokens // 2).abs()
    out, _, stored = run(call, device, dtype)
    exact = by_torch(stored)
    limit = 2 * (by_torch(stored, dtype).double() - exact).abs().max() + 2e-6 * exact.abs().max()
    assert (out - exact).abs().max() <= limit


@pytest.mark.parametrize(("format", "most"), [("int8", 0.01), ("fp8", 0.05), ("int4", 0.15)])
def test_near_the_attention_over_whole_pairs(device: torch.device, format: str, most: float) -> None:
    call = rows(0, 1, 4, 2, 3, 500, 128) | {"format": format, "causal": False}
    out, _, _ = run(call, device, torch.float32)
    exact = by_torch(call)
    error = float((out - exact).norm() / exact.norm())
    assert most / 20 < error < most


@pytest.mark.parametrize("size", [1e-3, 1e4])
@pytest.mark.parametrize("format", FORMATS)
def test_small_and_large_values_in_float16(device: torch.device, format: str, size: float) -> None:
    """A scale of 1e-5 times an attention would be nothing in float16, and one pair has all of the attention."""
    call = rows(0, 1, 4, 2, 2, 200, 64) | {"format": format, "causal": False}
    call["value"] *= size
    call["value"][:, :, 8] = 6e4 * size / 1e4
    call["value"][:, :, 8, ::2] *= -1
    call["key_bias"] = torch.zeros(1, 2, 9)
    call["key_bias"][..., 8] = 30.0
    out, _, stored = run(call, device, torch.float16)
    torch.testing.assert_close(out, by_torch(stored), rtol=4e-3, atol=4e-3 * size)


@pytest.mark.parametrize("format", FORMATS)
def test_softcap(device: torch.device, format: str) -> None:
    call = rows(0, 2, 4, 2, 3, 90, 8) | {"format": format, "causal": False, "softcap": 0.5}
    _, lse, stored = run(call | {"key_bias": random(5, 2, 2, 7)}, device, torch.float32)
    torch.testing.assert_close(lse, log_sum_exp(stored), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, LOW_PRECISION[-1]])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("format", FORMATS)
def test_padding_free_places_and_the_batch_change_no_bit(
    device: torch.device, format: str, queries: int, dtype: torch.dtype
) -> None:
    """Rows of three lengths in a buffer with NaN and the largest codes behind the last pair, and each row alone."""
    tokens, starts, ends = 400, [0, 70, 13], [330, 400, 200]
    call = {name: x.to(device, dtype) for name, x in rows(3, 3, 4, 2, queries, tokens, 16).items()}
    start, end = (torch.tensor(places, dtype=torch.int32, device=device) for places in (starts, ends))
    pairs = quantize_pairs(call["key"], call["value"], format, key_start=start)
    bias = random(5, 3, 2, 350, device=device)
    for row, last in enumerate(ends):
        blocks = -(-(last - starts[row]) // 64)
        for name, x in pairs._asdict().items():
            if x is None or name == "key_start":
                continue
            behind = x[row, :, blocks if format == "int4" and name in ("key_scale", "key_zero") else last :]
            behind.copy_(torch.full_like(behind.float(), math.nan if x.is_floating_point() else 127))
        bias[row, :, last:] = math.nan
    together = quantized_attention(call["query"], pairs, key_bias=bias, key_end=end)
    assert not together[0].isnan().any()
    for row, (first, last) in enumerate(zip(starts, ends, strict=True)):
        one, places = slice(row, row + 1), slice(first, last)
        cut = {
            name: x if x is None else x[one, :, slice(0, -(-(last - first) // 64)) if blocks else places].clone()
            for name, x in pairs._asdict().items()
            for blocks in [format == "int4" and name in ("key_scale", "key_zero")]
            if name != "key_start"
        }
        alone = quantized_attention(
            call["query"][one].clone(), type(pairs)(**cut), key_bias=bias[one, :, places].clone()
        )
        for whole, single in zip(together, alone, strict=True):
            assert same_bits(whole[one], single)


@pytest.mark.parametrize("format", FORMATS)
def test_a_pair_that_is_not_a_number_is_seen(device: torch.device, format: str) -> None:
    call = {name: x.to(device, torch.float32) for name, x in rows(0, 2, 4, 2, 1, 90, 8).items()}
    call["key"][1, 1, 80, 3] = math.inf
    pairs = quantize_pairs(call["key"], call["value"], format)
    out, lse = quantized_attention(call["query"], pairs)
    marked = torch.zeros(2, 4, 1, dtype=torch.bool, device=device)
    marked[1, 2:] = True
    assert torch.equal(lse.isnan(), marked)
    assert torch.equal(out.isnan(), marked[..., None].expand_as(out))


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("format", FORMATS)
def test_nothing_large_is_made(format: str) -> None:
    """Neither the whole attention matrix nor the numbers of all codes."""
    query, key = random(0, 1, 32, 300, 16), random(1, 1, 8, 8192, 16)
    pairs = quantize_pairs(key, key, format)
    with Largest(query, *(x for x in pairs if x is not None)) as largest:
        # not the op, inside which torch's mode sees nothing
        reference.quantized_attention(query, *pairs[:6], None, None, None, 0.25, None)
    assert BLOCK_ELEMENTS <= largest.bytes <= 4 * BLOCK_ELEMENTS
    with Largest(query, *(x for x in pairs if x is not None)) as largest:
        reference.quantized_attention(query[:, :, :1], *pairs[:6], None, None, None, 0.25, None)
    assert largest.bytes < key.nbytes / 2


@pytest.mark.parametrize("format", FORMATS)
def test_a_window_of_whole_pairs_is_joined(device: torch.device, format: str) -> None:
    """As in a cache: the first 90 pairs in few bits, the newest 20 whole; the padding of a row ends among those."""
    call = rows(0, 2, 4, 2, 5, 110, 16)
    own = {name: x.to(device, torch.float32) for name, x in call.items()}
    start = torch.tensor([0, 95], dtype=torch.int32, device=device)
    pairs = quantize_pairs(*(own[name][:, :, :90] for name in ("key", "value")), format, key_start=start.clamp(max=90))
    first = quantized_attention(own["query"], pairs)
    window = {name: own[name][:, :, 90:] for name in ("key", "value")}
    second = kept_attention(own["query"], **window, key_start=(start - 90).clamp(min=0), return_lse=True)
    out, lse = combine_attention([first[0], second[0]], [first[1], second[1]])
    few = dequantize_pairs(pairs, torch.float64)
    stored = {
        name: torch.cat((x.cpu(), call[name][:, :, 90:]), 2) for name, x in zip(("key", "value"), few, strict=True)
    }
    stored = call | stored | {"key_start": start.cpu()}
    torch.testing.assert_close(out.double().cpu(), by_torch(stored), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double().cpu(), log_sum_exp(stored), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32])
def test_parts_are_joined(device: torch.device, dtype: torch.dtype) -> None:
    """Three parts, of which rows and queries see none, some or all; what an unseen part holds does not count."""
    outs = [random(part, 2, 3, 4, 5, dtype=dtype, device=device) for part in range(3)]
    lses = [20 * random(9 + part, 2, 3, 4, device=device) for part in range(3)]
    lses[0][0], lses[1][0, 1], lses[2][0, 1, 2] = -math.inf, -math.inf, -math.inf
    outs[1][0, 1] = math.nan
    out, lse = combine_attention(outs, lses)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    exact = torch.stack(lses).double()
    shares = (exact - exact.logsumexp(0)).exp().nan_to_num(0.0)
    goal = (torch.stack(outs).double().nan_to_num(0.0) * shares[..., None]).sum(0)
    torch.testing.assert_close(out.double(), goal, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact.logsumexp(0), rtol=1e-6, atol=1e-6)
    assert bool((out[0, 1, 2] == 0).all())


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "`outs` must be one part or more"),
        ([torch.zeros(1, 1, 1, 2)], [], ValueError, "`lses` must be 1, one for each of `outs`, got 0"),
        ([torch.zeros(1, 1, 1, 2)], [torch.zeros(1, 1, 2)], ValueError, r"`lses\[0\]` must be \[B, Hq, M\]"),
        ([torch.zeros(1, 1, 1, 2)], [torch.zeros(1, 1, 1).half()], TypeError, r"`lses\[0\]` must be float32"),
        ([torch.zeros(1, 1, 1, 2, requires_grad=True)], [torch.zeros(1, 1, 1)], ValueError, "not require a gradient"),
        ([[0.0]], [torch.zeros(1, 1, 1)], TypeError, r"`outs\[0\]` must be a tensor"),
    ],
)
def test_bad_parts(outs: Any, lses: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        combine_attention(outs, lses)
