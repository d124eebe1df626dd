"""merge_: kept_weight times the kept row plus the weighted rows that merge into it, and nothing else changes."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import (
    EXACT,
    LAYOUTS,
    LOW_PRECISION,
    MIXED,
    check_outs,
    laid_out,
    memory,
    only_written,
    random,
    same_bits,
    tiers,
)
from torch import Tensor
from torch.nn.functional import one_hot

from lookm_kernels import compact_, merge_, select_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Merge(NamedTuple):
    """The arguments of one call after key and value."""

    kept: Tensor
    evicted: Tensor
    pivot: Tensor
    evicted_weight: Tensor
    kept_weight: Tensor


def some_merge(seed: int, key: Tensor, keep: list[int], hub: bool = False) -> Merge:
    """Random weights and pivots, some of them 0, 1 and -1; with `hub` every token merges into the last kept one."""
    batch, heads, tokens, _ = key.shape
    weight_dtype, device = torch.float64 if key.dtype == torch.float64 else torch.float32, key.device
    scores = random(seed, batch, heads, tokens, device=device)
    kept, evicted = select_tokens(scores, tiers(seed, batch, tokens, device), keep)
    pivot = random(seed + 1, *evicted.shape, device=device).mul(1e6).int() % (kept.shape[-1] + 1) - 1
    if hub:
        pivot = torch.full_like(evicted, kept.shape[-1] - 1)
    filled = kept.gather(-1, pivot.clamp(min=0).long()) >= 0 if kept.shape[-1] else torch.zeros_like(evicted).bool()
    pivot = pivot.masked_fill((evicted < 0) | ~filled, -1)
    evicted_weight = random(seed + 2, *evicted.shape, dtype=weight_dtype, device=device)
    kept_weight = random(seed + 3, *kept.shape, dtype=weight_dtype, device=device)
    evicted_weight = evicted_weight.masked_fill(evicted_weight > 1, 0.0)
    return Merge(kept, evicted, pivot, evicted_weight, kept_weight.masked_fill(kept_weight > 0.5, 1.0))


def changed(x: Tensor, merge: Merge) -> Tensor:
    """[B, H, N, 1] bool: kept rows that a merge changes."""
    target = torch.zeros(*merge.kept.shape[:2], merge.kept.shape[-1] + 1, dtype=torch.bool, device=x.device)
    target.scatter_(-1, merge.pivot.masked_fill(merge.evicted_weight == 0, -1).long() % target.shape[-1], True)
    rows = torch.zeros(*x.shape[:2], x.shape[2] + 1, dtype=torch.bool, device=x.device)
    rows.scatter_(-1, merge.kept.long() % rows.shape[-1], target[..., :-1] | (merge.kept_weight != 1))
    return rows[..., :-1, None]


def merged(x: Tensor, merge: Merge) -> Tensor:
    """The equation at the dtype of x, by a matrix product with one column an evicted token; x where nothing changes."""
    places = merge.kept.shape[-1]
    if places == 0:
        return x.clone()
    weight = merge.evicted_weight.masked_fill(merge.pivot < 0, 0.0).to(x.dtype)
    spread = one_hot(merge.pivot.clamp(min=0).long(), places).to(x.dtype) * weight[..., None]
    moving = x.take_along_dim(merge.evicted.clamp(min=0).long()[..., None], 2).masked_fill(weight[..., None] == 0, 0.0)
    own = x.take_along_dim(merge.kept.clamp(min=0).long()[..., None], 2) * merge.kept_weight[..., None].to(x.dtype)
    out = torch.cat([x, torch.zeros_like(x[:, :, :1])], 2)
    target = (merge.kept.long() % out.shape[2])[..., None].expand_as(own)
    return torch.where(changed(x, merge), out.scatter(2, target, own + spread.mT @ moving)[:, :, :-1], x)


def check_into_others(key: Tensor, value: Tensor, merge: Merge) -> None:
    """With outs what merge_ and compact_ leave in place."""

    def run(*pair: Tensor, **outs: Tensor) -> None:
        merge_(*pair, *merge, **outs)
        if not outs:
            compact_(*pair, merge.kept)

    check_outs(run, key, value, merge.kept.shape[2])


def check(key: Tensor, value: Tensor, merge: Merge) -> None:
    """Values by the equation in float64; every place that should not change keeps its bits, around the tensors too."""
    tensors = (key, value)
    check_into_others(key, value, merge)
    before = [memory(x).clone() for x in tensors]
    expected = [merged(x.double(), merge) for x in tensors]
    assert merge_(key, value, *merge) is None
    for x, was, goal in zip(tensors, before, expected, strict=True):
        tolerance = 1e-12 if x.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(x.double(), goal, rtol=tolerance, atol=tolerance)
        assert only_written(x, was, changed(x, merge).expand_as(x))


def counted(merge: Merge, votes: Tensor) -> Tensor:
    """[B, H, K] float64: the votes of every kept token and of what merges into it, one token after the other."""
    goal = torch.zeros(merge.kept.shape, dtype=torch.float64)
    places, moves, tokens, weights = (merge[i].tolist() for i in (0, 2, 1, 3))
    for row, head in torch.cartesian_prod(*map(torch.arange, goal.shape[:2])).tolist():
        own = votes[row, head].tolist()
        for c, token in enumerate(places[row][head]):
            if token >= 0:
                goal[row, head, c] = own[token]
        for to, token, weight in zip(moves[row][head], tokens[row][head], weights[row][head], strict=True):
            if token >= 0 and to >= 0 and weight != 0:
                goal[row, head, to] += own[token]
    return goal


def whole_votes(seed: int, key: Tensor, most: int) -> Tensor:
    """[B, H, N] float32 on the device of key: whole numbers from 0 to `most`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, most + 1, key.shape[:3], generator=generator).float().to(key.device)


def check_votes(key: Tensor, value: Tensor, merge: Merge, votes: Tensor | None, tolerance: float = 0.0) -> None:
    """Votes as counted, in place and with outs, and the pairs as without asking for them, bit for bit."""
    plain, ours = ((key.clone(), value.clone()) for _ in range(2))
    merge_(*plain, *merge)
    given = None if votes is None else votes.clone()
    goal = counted(merge, torch.ones(key.shape[:3]) if votes is None else votes)
    rows = [x.new_empty(*merge.kept.shape, x.shape[3]) for x in (key, value)]
    for pair, outs in ((ours, {}), ((key, value), dict(zip(("out_key", "out_value"), rows, strict=True)))):
        out_votes = torch.full(merge.kept.shape, float("nan"), device=key.device)
        merge_(*pair, *merge, votes=given, out_votes=out_votes, **outs)
        torch.testing.assert_close(out_votes.cpu().double(), goal, rtol=tolerance, atol=0)
        assert not out_votes[merge.kept < 0].any()
    assert all(map(same_bits, ours, plain))
    assert given is None or same_bits(given, votes)


@given(data=st.data())
def test_votes_are_those_of_all_that_merged(device: torch.device, data: st.DataObject) -> None:
    """Whole numbers, so exactly; some weights are 0, some pivots -1, some places empty."""
    batch, heads, tokens = (data.draw(st.integers(1, top)) for top in (2, 3, 30))
    keep = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    seed = data.draw(st.integers(0, 2**31))
    key, value = (random(seed + i, batch, heads, tokens, width, device=device) for i, width in enumerate((4, 3)))
    votes = whole_votes(seed, key, 9) if data.draw(st.booleans()) else None
    check_votes(key, value, some_merge(seed, key, keep), votes)


@pytest.mark.parametrize("given", [False, True], ids=["one each", "given"])
@pytest.mark.parametrize("hub", [False, True], ids=["spread", "hub"])
@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32])
def test_votes_of_a_large_layer(device: torch.device, dtype: torch.dtype, hub: bool, given: bool) -> None:
    """Two budgets; the votes may be a window of something larger; also when one kept token attracts every other."""
    key, value = (random(seed, 2, 2, 507, 8, dtype=dtype, device=device) for seed in (0, 1))
    votes = laid_out(whole_votes(0, key, 1000)[..., None], "window")[..., 0] if given else None
    check_votes(key, value, some_merge(0, key, [60, 50], hub), votes)


@pytest.mark.parametrize("hub", [False, True], ids=["spread", "hub"])
def test_votes_need_not_be_whole(device: torch.device, hub: bool) -> None:
    """What remains of a token that was split counts as such."""
    key, value = (random(seed, 2, 2, 507, 8, device=device) for seed in (0, 1))
    votes = random(2, 2, 2, 507, device=device).abs()
    check_votes(key, value, some_merge(0, key, [60, 50], hub), votes, 1e-5)


def test_votes_where_nothing_is_kept_or_evicted(device: torch.device) -> None:
    key, value = (random(seed, 1, 2, 17, 4, device=device) for seed in (0, 1))
    for keep in (0, 17):
        check_votes(key, value, some_merge(0, key, [keep]), whole_votes(0, key, 5))
        check_votes(key, value, some_merge(0, key, [keep]), None)


@given(data=st.data())
def test_equals_the_equation(device: torch.device, data: st.DataObject) -> None:
    batch, heads, tokens, width, value_width = (data.draw(st.integers(1, top)) for top in (2, 3, 30, 9, 9))
    keep = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    seed, layout = data.draw(st.integers(0, 2**31)), st.sampled_from(LAYOUTS)
    shape, dtype = (batch, heads, tokens), st.sampled_from(EXACT)
    key = laid_out(random(seed, *shape, width, dtype=data.draw(dtype), device=device), data.draw(layout))
    value = laid_out(random(seed + 1, *shape, value_width, dtype=data.draw(dtype), device=device), data.draw(layout))
    check(key, value, some_merge(seed, key, keep))


@pytest.mark.parametrize("hub", [False, True], ids=["spread", "hub"])
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_each_in_its_own_dtype(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], hub: bool) -> None:
    """Summed in float32 and rounded once to the dtype of the tensor, whatever that of the other; nothing else moves."""
    key = laid_out(random(0, 2, 2, 507, 64, dtype=dtypes[0], device=device), "heads_last")
    value = laid_out(random(1, 2, 2, 507, 24, dtype=dtypes[1], device=device), "window")
    merge = some_merge(0, key, [60, 50], hub)
    check_into_others(key, value, merge)
    before, exact = [memory(x).clone() for x in (key, value)], [x.float() for x in (key, value)]
    merge_(key, value, *merge)
    merge_(*exact, *merge)
    for x, was, goal in zip((key, value), before, exact, strict=True):
        torch.testing.assert_close(x.float(), goal, rtol=torch.finfo(x.dtype).eps, atol=1e-6)
        assert only_written(x, was, changed(x, merge).expand_as(x))


@pytest.mark.parametrize("hub", [False, True], ids=["spread", "hub"])
@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32])
@pytest.mark.parametrize(("tokens", "keep"), [(1, 1), (17, 1), (255, 17), (507, 255), (507, 2)])
def test_no_less_exact_than_torch(device: torch.device, tokens: int, keep: int, dtype: torch.dtype, hub: bool) -> None:
    """Also when one kept token attracts every evicted one."""
    key = laid_out(random(tokens, 2, 2, tokens, 64, dtype=dtype, device=device), "window")
    value = laid_out(random(keep, 2, 2, tokens, 80, dtype=dtype, device=device), "heads_last")
    merge = some_merge(keep, key, [keep], hub)
    exact = [merged(x.double(), merge) for x in (key, value)]
    torch_error = [(merged(x, merge) - goal).abs().max() for x, goal in zip((key, value), exact, strict=True)]
    merge_(key, value, *merge)
    for x, goal, error in zip((key, value), exact, torch_error, strict=True):
        assert (x - goal).abs().max() <= error + 1e-6 * goal.abs().max()


def test_wide_rows(device: torch.device) -> None:
    """So wide that each of the heads is a block of its own."""
    key, value = random(0, 1, 3, 4400, 4, device=device), random(1, 1, 3, 4400, 1000, device=device)
    check(key, value, some_merge(0, key, [1500]))


def test_rounds_once(device: torch.device) -> None:
    """Thousands of small rows: rounded one by one to 16 bits they would be lost."""
    dtype = LOW_PRECISION[-1]
    key = torch.full((1, 1, 4001, 2), 2.0**-9, dtype=dtype, device=device)
    key[:, :, 0] = 1.0
    tokens = torch.arange(4001, dtype=torch.int32, device=device)[None, None]
    pivot, weight = torch.zeros_like(tokens[..., 1:]), torch.ones(1, 1, 4000, device=device)
    merge_(key, key.clone(), tokens[..., :1], tokens[..., 1:], pivot, weight, weight[..., :1])
    assert bool((key[:, :, 0] == torch.tensor(1 + 4000 * 2.0**-9, device=device, dtype=dtype)).all())


def test_a_token_of_weight_zero_is_not_read(device: torch.device) -> None:
    key, value = random(0, 1, 2, 17, 8, device=device), random(1, 1, 2, 17, 8, device=device)
    merge = some_merge(0, key, [6])
    unread = merge.evicted[merge.evicted_weight == 0].long()
    assert unread.numel()
    heads = (merge.evicted_weight == 0).nonzero()[:, 1]
    key[0, heads, unread] = float("nan")
    merge_(key, value, *merge)
    finite = key.isfinite().all(-1)
    assert not finite[0, heads, unread].any()
    assert int(finite.sum()) == 2 * 17 - unread.numel()


@pytest.mark.parametrize("keep", [0, 17], ids=["nothing kept", "nothing evicted"])
def test_nothing_to_merge(device: torch.device, keep: int) -> None:
    """Not even -0 becomes 0."""
    key, value = random(0, 1, 2, 17, 8, device=device), random(1, 1, 2, 17, 8, device=device)
    key[..., 0] = -0.0
    # not the bits of a NaN that arithmetic gives
    key.view(torch.int32)[..., 1] = 0x7FC12345
    merge = some_merge(0, key, [keep])
    check_into_others(key, value, merge._replace(kept_weight=torch.ones_like(merge.kept_weight)))
    before = key.clone(), value.clone()
    merge_(key, value, *merge._replace(kept_weight=torch.ones_like(merge.kept_weight)))
    assert same_bits(key, before[0])
    assert same_bits(value, before[1])
