"""attention_scores: the column sums of the attention matrix, in every variant."""

from __future__ import annotations

from typing import Any

import loops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import EXACT, LAYOUTS, LOW_PRECISION, MIXED, laid_out, random, same_bits
from torch import Tensor
from torch.nn.functional import pad

from lookm_kernels import attention_scores, quantize_heads

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def materialised(query: Tensor, key: Tensor, mask: Tensor | None = None, softcap: float | None = None) -> Tensor:
    """[B, Hq, M, N] causal logits at the dtype of the inputs, by plain torch."""
    queries, tokens = query.shape[2], key.shape[2]
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * query.shape[-1] ** -0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    seen = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)
    return logits.masked_fill(~(seen if mask is None else seen & mask), float("-inf"))


def summed(logits: Tensor, kv_heads: int) -> Tensor:
    """[B, H, N]: softmax, then the sum over the queries of a KV head."""
    return logits.softmax(-1).unflatten(1, (kv_heads, -1)).sum((2, 3))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, options and layouts of one call; tensors on the CPU in float64."""
    batch, kv_heads, group, width = (draw(st.integers(1, top)) for top in (2, 3, 3, 9))
    tokens = draw(st.integers(1, 17))
    queries, seed = draw(st.integers(1, tokens)), draw(st.integers(0, 2**31))
    heads = kv_heads * group
    size = draw(st.sampled_from([0.1, 1.0, 10.0]))
    call: dict[str, Any] = {
        "query": random(seed, batch, heads, queries, width, dtype=torch.float64) * size,
        "key": random(seed + 1, batch, kv_heads, tokens, width, dtype=torch.float64),
        "scale": draw(st.sampled_from([None, 0.5])),
        "causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, 5.0])),
    }
    if draw(st.booleans()):
        weight = random(seed + 2, batch, queries, dtype=torch.float64)
        call["query_weight"] = weight.masked_fill(weight < -0.5, 0.0)
    if draw(st.booleans()):
        start = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        call["key_start"] = torch.tensor(start, dtype=torch.int32)
    if draw(st.booleans()):
        rows, per_head = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
        call["mask"] = random(seed + 3, rows, per_head, queries, tokens) > draw(st.sampled_from([-1.0, 0.0, 1.0]))
    if draw(st.booleans()):
        call["head_scale"] = random(seed + 4, batch, heads, dtype=torch.float64).exp()
    if draw(st.booleans()):
        chance = random(seed + 5, batch, tokens)
        used = [draw(st.integers(0, queries)) for _ in range(batch)]
        places = [chance[row].argsort()[:count].sort().values for row, count in enumerate(used)]
        call["query_position"] = torch.stack(
            [pad(place, (queries - len(place), 0), value=-1) for place in places]
        ).int()
    return call


def spread(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with a query at every token, in float64: those that were not given have weight 0."""
    query, position, tokens = call["query"], call["query_position"].long(), call["key"].shape[2]
    batch, heads, queries, width = query.shape
    weight = call.get("query_weight", torch.ones(batch, queries, dtype=torch.float64)).where(position >= 0, 0.0)
    everywhere = {
        "query": torch.zeros(batch, heads, tokens, width, dtype=torch.float64),
        "query_weight": torch.zeros(batch, tokens, dtype=torch.float64),
    }
    mask = call.get("mask", torch.ones(1, 1, queries, tokens, dtype=torch.bool))
    everywhere["mask"] = torch.ones(batch, mask.shape[1], tokens, tokens, dtype=torch.bool)
    for row in range(batch):
        for i in range(queries):
            if position[row, i] >= 0:
                everywhere["query"][row, :, position[row, i]] = query[row, :, i]
                everywhere["query_weight"][row, position[row, i]] = weight[row, i]
                everywhere["mask"][row, :, position[row, i]] = mask[row % mask.shape[0], :, i]
    return call | everywhere


def by_loops(call: dict[str, Any]) -> Tensor:
    """The oracle, row by row without the padding."""
    call = call if call.get("query_position") is None else spread(call)
    query, key = call["query"], call["key"]
    if "head_scale" in call:
        query = query * call["head_scale"][:, :, None, None]
    (batch, _, queries, width), tokens = query.shape, key.shape[2]
    scale = width**-0.5 if call["scale"] is None else call["scale"]
    scores = torch.zeros(key.shape[:3], dtype=torch.float64)
    for row in range(batch):
        start = int(call["key_start"][row]) if "key_start" in call else 0
        first = max(0, start - (tokens - queries))
        mask, weight = call.get("mask"), call.get("query_weight")
        scores[row, :, start:] = loops.column_sums(
            query[row, :, first:],
            key[row, :, start:],
            scale,
            call["causal"],
            None if mask is None else mask[row % mask.shape[0], :, first:, start:],
            None if weight is None else weight[row, first:],
            call["softcap"],
        )
    return scores


@given(call=calls(), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(EXACT))
def test_equals_loops(device: torch.device, call: dict[str, Any], layout: str, dtype: torch.dtype) -> None:
    on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}
    for name in ("query", "key"):
        on_device[name] = laid_out(on_device[name].to(dtype), layout)
    scores = attention_scores(**on_device)
    assert scores.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(scores.cpu().double(), by_loops(call), rtol=tolerance, atol=tolerance)


@given(call=calls(), weightings=st.integers(1, 3))
def test_several_weightings_are_calls_of_their_own(device: torch.device, call: dict[str, Any], weightings: int) -> None:
    """Bit for bit; some queries are shared out among the weightings, as those of text and of images are."""
    on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}
    for name in ("query", "key"):
        on_device[name] = on_device[name].float()
    batch, _, queries, _ = call["query"].shape
    chance = random(weightings, batch, weightings, queries)
    weight = chance.abs().masked_fill(chance < 0, 0.0).to(device)
    together = attention_scores(**on_device | {"query_weight": weight})
    assert together.shape == (batch, weightings, *call["key"].shape[1:3])
    for place in range(weightings):
        alone = attention_scores(**on_device | {"query_weight": weight[:, place]})
        assert same_bits(together[:, place], alone)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("nothing_seen", [float("-inf"), float("inf"), 0.0])
def test_known_log_sum_exp(device: torch.device, nothing_seen: float, softcap: float | None) -> None:
    """Backends differ in what they return for a query that sees nothing: it contributes nothing with any of them."""
    query, key = random(0, 2, 6, 17, 8, device=device), random(1, 2, 3, 17, 8, device=device)
    mask = random(2, 2, 1, 17, 17, device=device) > 0
    mask[:, :, 3] = False
    lse = materialised(query, key, mask, softcap).logsumexp(-1)
    lse[:, :, 3] = nothing_seen
    known = attention_scores(query, key, mask=mask, lse=lse, softcap=softcap)
    torch.testing.assert_close(known, attention_scores(query, key, mask=mask, softcap=softcap), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32])
@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (1, 17), (17, 17), (17, 255), (255, 255), (507, 507)])
def test_no_less_exact_than_torch(device: torch.device, queries: int, tokens: int, dtype: torch.dtype) -> None:
    """64 heads, so that 507 queries are more than one block."""
    query = laid_out(random(queries, 1, 64, queries, 8, dtype=dtype, device=device), "window")
    key = laid_out(random(tokens, 1, 16, tokens, 8, dtype=dtype, device=device), "heads_last")
    exact = summed(materialised(query.double(), key.double()), 16)
    error = (attention_scores(query, key) - exact).abs().max()
    assert error <= (summed(materialised(query, key), 16) - exact).abs().max() + 1e-6 * exact.max()


@pytest.mark.parametrize("dtypes", [*MIXED, *[LOW_PRECISION] * (len(LOW_PRECISION) - 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_query_and_a_key_of_two_dtypes(
    device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], layout: str
) -> None:
    """Nothing is rounded: the bits of the same numbers in float32."""
    query, key = (
        laid_out(random(heads, 2, heads, 33, 16, dtype=dtype, device=device), layout)
        for heads, dtype in zip((4, 2), dtypes, strict=True)
    )
    assert same_bits(attention_scores(query, key), attention_scores(query.float(), key.float()))


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    """Of thousands, far beyond what exp takes; they are rounded to 2 ** -12, so attention is exact to a thousandth."""
    query, key = random(0, 1, 2, 9, 8, device=device) * 30, random(1, 1, 1, 9, 8, device=device) * 30
    exact = summed(materialised(query.double(), key.double()), 1).float()
    torch.testing.assert_close(attention_scores(query, key), exact, rtol=1e-3, atol=1e-3)


def test_a_query_of_weight_zero_is_left_out(device: torch.device) -> None:
    """Whatever it holds: NaN, and a log-sum-exp of 0 under which its exponentials overflow."""
    query, key = random(0, 1, 2, 9, 8, device=device), random(1, 1, 1, 9, 8, device=device)
    weight = torch.ones(1, 9, device=device)
    weight[0, 4:6] = 0
    lse = materialised(query, key).logsumexp(-1)
    clean = attention_scores(query, key, query_weight=weight, lse=lse)
    query[:, :, 4], query[:, :, 5], lse[:, :, 4:6] = float("nan"), 1e4, 0.0
    assert same_bits(attention_scores(query, key, query_weight=weight, lse=lse), clean)
    torch.testing.assert_close(attention_scores(query, key, query_weight=weight), clean)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("picked", [False, True])
def test_a_bad_key_that_no_query_sees_scores_nothing(device: torch.device, bad: float, picked: bool) -> None:
    query, key = random(0, 1, 2, 10, 8, device=device), random(1, 1, 1, 10, 8, device=device)
    weight = (torch.arange(10, device=device) < 4).float()[None]
    options: dict[str, Any] = {"query_weight": weight}
    if picked:
        query, position = query[:, :, :3], torch.tensor([[0, 2, 4]], dtype=torch.int32, device=device)
        options = {"query_position": position}
    clean = attention_scores(query, key, **options)
    key[0, 0, 7] = bad
    assert same_bits(attention_scores(query, key, **options), clean)
    assert float(clean[0, 0, 7]) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_key_stays_in_its_head_and_row(device: torch.device, bad: float) -> None:
    """It is not lost either: the scores of all it could have changed are not numbers."""
    query, key = random(0, 2, 4, 17, 8, device=device), random(1, 2, 2, 17, 8, device=device)
    clean = attention_scores(query, key)
    key[1, 0, 5] = bad
    scores = attention_scores(query, key)
    assert same_bits(scores[0], clean[0])
    assert same_bits(scores[1, 1], clean[1, 1])
    assert not scores[1, 0].isfinite().any()


def test_padding_is_not_read(device: torch.device) -> None:
    query, key = random(0, 2, 4, 9, 8, device=device), random(1, 2, 2, 17, 8, device=device)
    start = torch.tensor([0, 11], dtype=torch.int32, device=device)
    clean = attention_scores(query, key, key_start=start)
    query[1, :, :3], key[1, :, :11] = float("nan"), float("nan")
    scores = attention_scores(query, key, key_start=start)
    assert same_bits(scores, clean)
    assert bool((scores[1, :, :11] == 0).all())


def test_every_row_of_the_matrix_sums_to_one(device: torch.device) -> None:
    scores = attention_scores(random(0, 1, 6, 255, 64, device=device), random(1, 1, 3, 507, 64, device=device))
    torch.testing.assert_close(scores.sum(-1), torch.full((1, 3), 2.0 * 255, device=device))


@pytest.mark.parametrize("given_lse", [False, True])
def test_picked_queries_are_as_good_as_weight_zero_elsewhere(device: torch.device, given_lse: bool) -> None:
    """Rows that pick different numbers of queries, more than one block of them, and padding."""
    query, key = random(0, 2, 4, 507, 8, device=device), random(1, 2, 2, 507, 8, device=device)
    start = torch.tensor([0, 300], dtype=torch.int32, device=device)
    lse = materialised(query, key).logsumexp(-1) if given_lse else None
    chosen = (torch.arange(507, device=device) % torch.tensor([[2], [3]], device=device)) == 0
    weight = 0.5 + random(2, 2, 507, device=device).abs()
    options: dict[str, Any] = {"key_start": start, "scale": 0.5}
    goal = attention_scores(query, key, lse=lse, query_weight=weight * chosen, **options)
    position = torch.where(chosen, torch.arange(507, device=device), -1).sort(-1).values[:, -254:].int()
    place = position.clamp(min=0).long()
    picked = query.gather(2, place[:, None, :, None].expand(-1, 4, -1, 8))
    picked_lse = None if lse is None else lse.gather(2, place[:, None].expand(-1, 4, -1))
    options |= {"lse": picked_lse, "query_weight": weight.gather(1, place), "query_position": position}
    scores = attention_scores(picked, key, **options)
    torch.testing.assert_close(scores, goal, rtol=1e-5, atol=1e-5)
    alone = {name: value[1:] if isinstance(value, Tensor) else value for name, value in options.items()}
    assert same_bits(attention_scores(picked[1:], key[1:], **alone), scores[1:])
    # without the empty places that the other row's number of queries brings
    empty = int((position[1] < 0).sum())
    assert empty > 0
    for name, dim in (("query_weight", 1), ("query_position", 1), ("lse", 2)):
        alone[name] = None if alone[name] is None else alone[name].narrow(dim, empty, 254 - empty)
    assert same_bits(attention_scores(picked[1:, :, empty:], key[1:], **alone), scores[1:])


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32])
def test_float8_heads(device: torch.device, dtype: torch.dtype) -> None:
    """The scores of what the quantized tensors stand for, whatever the size of a head; padding sets no scale."""
    sizes = torch.tensor([1e-3, 1.0, 30.0, 1.0], device=device)[:, None, None]
    query, key = random(0, 2, 4, 33, 16, device=device) * sizes, random(1, 2, 2, 33, 16, device=device) / sizes[::2]
    query, key = query.to(dtype), key.to(dtype)
    start = torch.tensor([0, 5], dtype=torch.int32, device=device)
    key[1, :, :5] = 1e4
    (query8, query_scale), (key8, key_scale) = quantize_heads(query), quantize_heads(key, start)
    key_scale = key_scale.repeat_interleave(2, 1)
    scores = attention_scores(query8, key8, head_scale=query_scale * key_scale, key_start=start)
    widened = query8.float() * query_scale[:, :, None, None], key8.float() * key_scale[:, ::2, None, None]
    close = 1e-2 if device.type == "cuda" else 1e-4
    torch.testing.assert_close(scores, attention_scores(*widened, key_start=start), rtol=close, atol=close)
    exact = attention_scores(query.float(), key.float(), key_start=start)
    assert (scores - exact).norm() <= 0.1 * exact.norm()
