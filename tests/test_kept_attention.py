"""kept_attention against torch's own attention in float64, whose mask holds the bias, the padding and the future."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import EXACT, INTERPRETED, LAYOUTS, LOW_PRECISION, laid_out, random, same_bits
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lookm_kernels import kept_attention
from lookm_kernels.reference import kept_attention as reference
from lookm_kernels.reference._blocks import BLOCK_ELEMENTS

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def added(call: dict[str, Any]) -> Tensor:
    """[B, Hq, M, N] float64: what is added to the logits, -inf where a key is hidden."""
    query, key = call["query"], call["key"]
    (batch, heads, queries, _), (kv_heads, tokens) = query.shape, key.shape[1:3]
    mask = torch.zeros(batch, heads, queries, tokens, dtype=torch.float64)
    ends = torch.full((batch,), tokens) if call.get("key_end") is None else call["key_end"]
    for row, end in enumerate(ends.tolist()):
        mask[row, ..., end:] = -math.inf
        if call.get("causal", True):
            for query_of_row in range(queries):
                mask[row, :, query_of_row, max(0, end - queries + query_of_row + 1) :] = -math.inf
    if call.get("key_bias") is not None:
        bias = call["key_bias"].double().repeat_interleave(heads // kv_heads, 1)
        mask[..., : bias.shape[2]] += bias[:, :, None]
    if call.get("key_start") is not None:
        mask.masked_fill_(torch.arange(tokens) < call["key_start"][:, None, None, None], -math.inf)
    return mask if call.get("mask") is None else mask.masked_fill(~call["mask"], -math.inf)


def by_torch(call: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """torch's attention with an explicit mask, 0 for a query that sees nothing; without a softcap."""
    mask, group = added(call), call["query"].shape[1] // call["key"].shape[1]
    query, key, value = (call[name].to(dtype) for name in ("query", "key", "value"))
    pairs = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    out = scaled_dot_product_attention(query, *pairs, mask.to(dtype), scale=call.get("scale"))
    return out.masked_fill((mask == -math.inf).all(-1, keepdim=True), 0.0)


def log_sum_exp(call: dict[str, Any]) -> Tensor:
    """[B, Hq, M] of the logits, softcap included, in float64."""
    key = call["key"].double().repeat_interleave(call["query"].shape[1] // call["key"].shape[1], 1)
    logits = call["query"].double() @ key.mT * (call.get("scale") or key.shape[3] ** -0.5)
    softcap = call.get("softcap")
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return (logits + added(call)).logsumexp(-1)


def rows(seed: int, batch: int, heads: int, kv_heads: int, queries: int, tokens: int, width: int) -> dict[str, Any]:
    """Query, key and value in float64."""
    shapes = {"query": (heads, queries, width), "key": (kv_heads, tokens, width), "value": (kv_heads, tokens, width)}
    return {
        name: random(seed + place, batch, *shape, dtype=torch.float64)
        for place, (name, shape) in enumerate(shapes.items())
    }


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes and options of one call; tensors on the CPU in float64, the bias in float32."""
    batch, kv_heads, group, width = (draw(st.integers(1, top)) for top in (2, 3, 3, 9))
    tokens, seed = draw(st.integers(1, 17)), draw(st.integers(0, 2**31))
    causal = draw(st.booleans())
    queries = draw(st.integers(1, tokens if causal else 19))
    call = rows(seed, batch, kv_heads * group, kv_heads, queries, tokens, width) | {"causal": causal}
    call["scale"] = draw(st.sampled_from([None, 0.5]))
    call["value"] = random(seed + 3, batch, kv_heads, tokens, draw(st.integers(1, 9)), dtype=torch.float64)
    if draw(st.booleans()):
        bias = random(seed + 4, batch, kv_heads, draw(st.integers(0, tokens)))
        call["key_bias"] = bias.masked_fill(bias > draw(st.sampled_from([1.0, 9.0])), -math.inf)
    if draw(st.booleans()):
        start = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        call["key_start"] = torch.tensor(start, dtype=torch.int32)
    if draw(st.booleans()):
        ends = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        call["key_end"] = torch.tensor(ends, dtype=torch.int32)
    if draw(st.booleans()):
        shape = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, kv_heads * group])), queries, tokens
        call["mask"] = random(seed + 5, *shape) > draw(st.sampled_from([-1.0, 0.0, 1.0]))
    return call


def run(call: dict[str, Any], device: torch.device, dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor]:
    """Output and log-sum-exp on the CPU."""
    own = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in call.items()}
    own |= {name: laid_out(own[name].to(dtype), layout) for name in ("query", "key", "value")}
    out, lse = kept_attention(**own, return_lse=True)
    assert out.dtype == dtype
    assert same_bits(kept_attention(**own), out)
    return [out.cpu(), lse.cpu()]


@given(call=calls(), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(EXACT))
def test_equals_torch(device: torch.device, call: dict[str, Any], layout: str, dtype: torch.dtype) -> None:
    out, lse = run(call, device, dtype, layout)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(out.double(), by_torch(call), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), log_sum_exp(call), rtol=tolerance, atol=tolerance)
    assert lse.dtype == dtype


SHAPES = [(1, 1), (1, 17), (17, 17), (5, 255), (1, 507), (30, 600)]


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32])
@pytest.mark.parametrize(("queries", "tokens"), SHAPES)
def test_no_less_exact_than_torch(device: torch.device, queries: int, tokens: int, dtype: torch.dtype) -> None:
    """Of numbers of that dtype: several splits and parts of keys, of a head size that is no power of two."""
    call = rows(queries + tokens, 2, 6, 2, queries, tokens, 80)
    call |= {name: x.to(dtype) for name, x in call.items()}
    call["key_start"] = torch.tensor([0, tokens // 3], dtype=torch.int32)
    call["key_bias"] = random(7, 2, 2, tokens // 2).abs()
    exact = by_torch(call)
    error = (run(call, device, dtype)[0].double() - exact).abs().max()
    assert error <= 2 * (by_torch(call, dtype).double() - exact).abs().max() + 2e-6 * exact.abs().max()


@pytest.mark.parametrize("softcap", [0.5, 5.0])
def test_softcap_comes_before_the_bias(device: torch.device, softcap: float) -> None:
    call = rows(0, 2, 4, 2, 3, 11, 8) | {"softcap": softcap, "key_bias": random(5, 2, 2, 7)}
    _, lse = run(call, device, torch.float32)
    torch.testing.assert_close(lse.double(), log_sum_exp(call), rtol=1e-5, atol=1e-5)


def test_a_pair_with_votes_is_all_it_stands_for(device: torch.device) -> None:
    """The proof of proportional attention: every pair m times, or once with log m added to its logit."""
    call = rows(0, 2, 6, 3, 1, 40, 16)
    votes = torch.arange(40) % 5 + 1
    full = {name: call[name].repeat_interleave(votes, 2) for name in ("key", "value")}
    whole, _ = run(call | full, device, torch.float32)
    bias = votes.log().expand(2, 3, -1).contiguous()
    torch.testing.assert_close(run(call | {"key_bias": bias}, device, torch.float32)[0], whole, rtol=1e-5, atol=1e-5)
    assert (run(call, device, torch.float32)[0] - whole).abs().max() > 1e-2


def test_a_query_that_sees_nothing(device: torch.device) -> None:
    """By padding, by the mask and by the bias."""
    call = rows(0, 3, 4, 2, 2, 9, 8) | {"key_start": torch.tensor([9, 0, 0], dtype=torch.int32)}
    call["mask"] = torch.ones(3, 1, 2, 9, dtype=torch.bool)
    call["mask"][1, :, 0] = False
    call["key_bias"] = torch.zeros(3, 2, 9)
    call["key_bias"][2, 1] = -math.inf
    out, lse = run(call, device, torch.float32)
    blind = torch.zeros(3, 4, 2, dtype=torch.bool)
    blind[0], blind[1, :, 0], blind[2, 2:] = True, True, True
    assert (out[blind] == 0).all()
    assert torch.equal(lse == -math.inf, blind)
    torch.testing.assert_close(out.double(), by_torch(call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, LOW_PRECISION[-1]])
@pytest.mark.parametrize(("queries", "group", "width"), [(1, 3, 64), (1, 1, 80), (9, 2, 8)])
def test_padding_and_the_batch_change_no_bit(
    device: torch.device, queries: int, group: int, width: int, dtype: torch.dtype
) -> None:
    """Rows of three lengths together, and each alone without its padding."""
    tokens, starts = (300, [0, 70, 299 - queries]) if INTERPRETED else (1500, [0, 700, 1499 - queries])
    call = rows(width, 3, 2 * group, 2, queries, tokens, width)
    own = {name: x.to(device, dtype) for name, x in call.items()} | {"key_bias": random(5, 3, 2, 290, device=device)}
    start = torch.tensor(starts, dtype=torch.int32, device=device)
    together = kept_attention(**own, key_start=start, return_lse=True)
    for row, pad in enumerate(starts):
        alone = {name: x[row : row + 1, :, (0 if name == "query" else pad) :].clone() for name, x in own.items()}
        for whole, single in zip(together, kept_attention(**alone, return_lse=True), strict=True):
            assert same_bits(whole[row : row + 1], single)


@pytest.mark.parametrize(("queries", "group"), [(1, 3), (9, 2)])
def test_free_places_of_a_buffer_change_no_bit(device: torch.device, queries: int, group: int) -> None:
    """A buffer that is full up to another place in each row, NaN behind it, and each row alone in one that fits."""
    tokens, starts, ends = 700, [0, 130, 20], [300, 520, 700]
    call = rows(3, 3, 2 * group, 2, queries, tokens, 16)
    own = {name: x.to(device, torch.float32) for name, x in call.items()}
    own["key_bias"] = random(5, 3, 2, 600, device=device)
    for row, end in enumerate(ends):
        for name in ("key", "value", "key_bias"):
            own[name][row, :, end:] = math.nan
    start, end = (torch.tensor(places, dtype=torch.int32, device=device) for places in (starts, ends))
    together = kept_attention(**own, key_start=start, key_end=end, return_lse=True)
    assert not together[0].isnan().any()
    for row, (first, last) in enumerate(zip(starts, ends, strict=True)):
        places = slice(first, last)
        alone = {
            name: x[row : row + 1, :, slice(None) if name == "query" else places].clone() for name, x in own.items()
        }
        for whole, single in zip(together, kept_attention(**alone, return_lse=True), strict=True):
            assert same_bits(whole[row : row + 1], single)


def test_one_query_after_another(device: torch.device) -> None:
    """The causal mask is right-aligned: many queries at once are the same as single ones over a growing cache."""
    call = rows(0, 2, 4, 2, 7, 23, 16)
    whole, _ = run(call, device, torch.float32)
    for i in range(7):
        pairs = {name: call[name][:, :, : 23 - 6 + i] for name in ("key", "value")}
        single, _ = run(call | pairs | {"query": call["query"][:, :, i : i + 1]}, device, torch.float32)
        torch.testing.assert_close(single, whole[:, :, i : i + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="float64 is the reference's alone")
@pytest.mark.parametrize(
    "options", [(), ("key_bias",), ("key_bias", "key_start", "key_end", "mask", "softcap")], ids=str
)
def test_gradients(device: torch.device, options: tuple[str, ...]) -> None:
    """Of the output, and where every query sees something of the log-sum-exp too."""
    inputs = [x.to(device).requires_grad_() for x in rows(0, 2, 4, 2, 3, 7, 4).values()]
    mask, bias = random(6, 2, 4, 3, 7, device=device) > -0.5, random(5, 2, 2, 5, device=device)
    mask[0, :, 1], bias[0, 0, 1] = False, -math.inf
    start = torch.tensor([0, 2], dtype=torch.int32, device=device)
    end = torch.tensor([6, 7], dtype=torch.int32, device=device)
    every = {"key_bias": bias, "key_start": start, "key_end": end, "mask": mask, "softcap": 3.0}
    chosen = {name: every[name] for name in options}
    both = "mask" not in options
    assert torch.autograd.gradcheck(lambda *rows: kept_attention(*rows, **chosen, return_lse=both), inputs)


@pytest.mark.skipif(INTERPRETED, reason="float64 is the reference's alone")
def test_gradients_through_a_compiled_graph(device: torch.device) -> None:
    torch.compiler.reset()
    bias = random(5, 2, 2, 5, device=device)
    found = []
    for compiled in (False, True):
        inputs = [x.to(device).requires_grad_() for x in rows(0, 2, 4, 2, 3, 7, 4).values()]
        function = torch.compile(kept_attention, fullgraph=True, backend="aot_eager") if compiled else kept_attention
        function(*inputs, key_bias=bias).square().sum().backward()
        found.append([x.grad for x in inputs])
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager)


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that was made under it."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_queries_make_nothing_large(dtype: torch.dtype) -> None:
    """A new image over a long cache: neither the whole attention matrix nor the keys anew."""
    query, key = random(0, 1, 32, 300, 16, dtype=dtype), random(1, 1, 8, 8192, 16, dtype=dtype)
    assert query[..., 0].numel() * key.shape[2] * 4 > 2 * 4 * BLOCK_ELEMENTS
    with Largest(query, key) as largest:
        # not the op, inside which torch's mode sees nothing
        out, _ = reference.kept_attention(query, key, key, None, None, None, None, True, 0.25, None)
    assert BLOCK_ELEMENTS <= largest.bytes <= 4 * BLOCK_ELEMENTS
    exact = by_torch({"query": query[:, :4], "key": key[:, :1], "value": key[:, :1]})
    assert (out[:, :4].double() - exact).abs().max() <= (2e-6 if dtype == torch.float32 else 4e-3)
