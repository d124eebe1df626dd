"""nearest_kept: the kept key that points the same way."""

from __future__ import annotations

import math

import loops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import EXACT, INTERPRETED, LAYOUTS, LOW_PRECISION, PLACE_MATTERS, laid_out, moved, random, same_bits, tiers
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lookm_kernels import nearest_kept, select_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def lists(seed: int, key: Tensor, keep: int | list[int]) -> tuple[Tensor, Tensor]:
    """Kept and evicted lists of random scores for a key tensor; row b has b tokens of padding."""
    batch, heads, tokens, _ = key.shape
    scores = random(seed, batch, heads, tokens, device=key.device)
    return select_tokens(scores, tiers(seed, batch, tokens, key.device), keep)


def ranges(key: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The first `keep` tokens as kept, the others as evicted."""
    tokens = torch.arange(key.shape[2], dtype=torch.int32, device=key.device).expand(*key.shape[:3])
    return tokens[..., :keep], tokens[..., keep:]


def check_against_loops(key: Tensor, kept: Tensor, evicted: Tensor, tolerance: float) -> None:
    """Cosines equal; the pivot is the oracle's, except where rounding decides between the two best."""
    pivot, similarity = (result.cpu() for result in nearest_kept(key, kept, evicted))
    key, kept, evicted = key.cpu().double(), kept.cpu(), evicted.cpu()
    for row, head in torch.cartesian_prod(torch.arange(key.shape[0]), torch.arange(key.shape[1])).tolist():
        here, listed = key[row, head], evicted[row, head] >= 0
        filled = kept[row, head][kept[row, head] >= 0].tolist()
        places, found = pivot[row, head, listed], similarity[row, head, listed]
        assert bool((pivot[row, head, ~listed] == -1).all())
        assert bool((similarity[row, head, ~listed] == 0).all())
        if not filled:
            assert bool((places == -1).all())
            continue
        first = kept.shape[-1] - len(filled)
        leaving = evicted[row, head, listed].tolist()
        slots, cosines = loops.nearest(here, filled, leaving)
        torch.testing.assert_close(found.double(), torch.tensor(cosines, dtype=torch.float64), rtol=0, atol=tolerance)
        options = here[filled]
        first_of_equals = (options[:, None] == options).all(-1).int().argmax(-1)
        assert INTERPRETED or torch.equal(first_of_equals[places - first].int(), places - first)
        for e in (places - first != torch.tensor(slots)).nonzero()[:, 0].tolist():
            chosen = loops.nearest(here, [filled[int(places[e]) - first]], [leaving[e]])[1][0]
            assert cosines[e] - chosen <= tolerance


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Keys among which some are zero and some equal, in any layout, and lists with per-row budgets."""
    batch, heads, tokens, width = (draw(st.integers(1, top)) for top in (2, 3, 40, 20))
    seed = draw(st.integers(0, 2**31))
    key = random(seed, batch, heads, tokens, width, dtype=draw(st.sampled_from(EXACT)))
    for token in draw(st.lists(st.integers(0, tokens - 1), max_size=3)):
        key[:, :, token] = 0
    for token in draw(st.lists(st.integers(0, tokens - 1), max_size=8)):
        key[:, :, token] = key[:, :, 0]
    keep = draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    return (laid_out(key, draw(st.sampled_from(LAYOUTS))), *lists(seed, key, keep))


@given(call=calls())
def test_equals_loops(device: torch.device, call: tuple[Tensor, Tensor, Tensor]) -> None:
    key, kept, evicted = call
    tolerance = 1e-6 if key.dtype == torch.float32 else 1e-14
    check_against_loops(moved(key, device), kept.to(device), evicted.to(device), tolerance)


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32])
@pytest.mark.parametrize(("tokens", "keep"), [(17, 1), (17, 16), (255, 17), (507, 255)])
def test_odd_sizes(device: torch.device, tokens: int, keep: int, dtype: torch.dtype) -> None:
    key = laid_out(random(tokens, 2, 2, tokens, 64, dtype=dtype, device=device), "window")
    check_against_loops(key, *lists(1, key, keep), 1e-6)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_no_less_exact_than_torch(device: torch.device, dtype: torch.dtype) -> None:
    """16 heads and 507 kept keys, so that 1,493 evicted ones are more than one block."""
    key = random(0, 1, 16, 2000, 16, dtype=dtype, device=device)
    kept, evicted = ranges(key, 507)
    pivot, similarity = nearest_kept(key, kept, evicted)
    best = key[:, :, :507].take_along_dim(pivot.long()[..., None], 2)
    exact = cosine_similarity(key[:, :, 507:].double(), best.double(), dim=-1)
    naive = cosine_similarity(key[:, :, 507:], best, dim=-1)
    assert (similarity - exact).abs().max() <= (naive - exact).abs().max() + 1e-6
    unit = torch.nn.functional.normalize(key.double(), dim=-1)
    torch.testing.assert_close(exact, (unit[:, :, 507:] @ unit[:, :, :507].mT).amax(-1), rtol=0, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason=PLACE_MATTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [5, 64, 80, 128, 256])
@pytest.mark.parametrize("keep", [1, 5, 7, 19, 54, 207])
def test_equal_keys_tie_to_the_lower_index(device: torch.device, keep: int, width: int, dtype: torch.dtype) -> None:
    """At every place of a block, also at its ragged end, and -0 is 0: two frames of a video may well be equal."""
    key = random(width, 1, 2, 1, width, dtype=dtype, device=device).expand(-1, -1, 255, -1).contiguous()
    key[..., 0], key[:, :, 0, 0] = 0.0, -0.0
    pivot, similarity = nearest_kept(key, *ranges(key, keep))
    assert not pivot.any()
    torch.testing.assert_close(similarity, torch.ones_like(similarity))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), float("-inf")])
def test_a_key_without_direction_has_cosine_0(device: torch.device, bad: float) -> None:
    key = random(0, 1, 1, 8, 4, device=device)
    kept, evicted = ranges(key, 4)
    opposite = -key[:, :, 1:4].sum(2, keepdim=True)
    key[:, :, 1:4], key[:, :, 4], key[:, :, 5:] = -opposite, opposite, -opposite
    key[:, :, 0] = bad
    pivot, similarity = nearest_kept(key, kept, evicted)
    # 0 is better than an opposite direction, and worse than the same one
    assert pivot.tolist() == [[[0, 1, 1, 1]]]
    torch.testing.assert_close(similarity, torch.tensor([[[0.0, 1.0, 1.0, 1.0]]], device=device))
    key[:, :, 4] = bad
    pivot, similarity = nearest_kept(key, kept, evicted)
    assert (int(pivot[0, 0, 0]), float(similarity[0, 0, 0])) == (0, 0.0)


def test_an_empty_place_is_no_pivot(device: torch.device) -> None:
    """Not even one whose row, if it were read, holds the same key as the pivot."""
    key = random(0, 1, 2, 4, 8, device=device)
    key[:, :, 3] = key[:, :, 0]
    kept = torch.tensor([[[-1, -1, 0], [-1, 0, 2]]], dtype=torch.int32, device=device)
    evicted = torch.tensor([[[-1, 3], [1, 3]]], dtype=torch.int32, device=device)
    pivot, similarity = nearest_kept(key, kept, evicted)
    assert pivot[..., 1].tolist() == [[2, 1]]
    assert int(pivot[0, 0, 0]) == -1
    torch.testing.assert_close(similarity[..., 1], torch.ones(1, 2, device=device))


def test_nothing_kept_or_nothing_evicted(device: torch.device) -> None:
    key = random(0, 2, 3, 17, 8, device=device)
    pivot, similarity = nearest_kept(key, *ranges(key, 0))
    assert bool((pivot == -1).all())
    assert not similarity.any()
    assert [result.shape for result in nearest_kept(key, *ranges(key, 17))] == [(2, 3, 0)] * 2


def test_lengths_of_keys_do_not_matter(device: torch.device) -> None:
    """Powers of two scale exactly."""
    key = random(0, 1, 2, 255, 16, device=device)
    lengths = 2.0 ** torch.arange(255, device=device).sub(127).div(4, rounding_mode="floor")[:, None]
    unscaled, scaled = nearest_kept(key, *ranges(key, 60)), nearest_kept(key * lengths, *ranges(key, 60))
    assert same_bits(unscaled[0], scaled[0])
    assert same_bits(unscaled[1], scaled[1])


def check_options(tolerance: float, key: Tensor, kept: Tensor, evicted: Tensor, **options: Tensor) -> None:
    """Every option against loops.pivot_of: the similarity to a tolerance, and a pivot that is as good as the best."""
    call = {name: x.cpu() for name, x in {"key": key, "kept": kept, "evicted": evicted, **options}.items()}
    pivot, similarity = (result.cpu() for result in nearest_kept(key, kept, evicted, **options))
    for row, head in torch.cartesian_prod(*map(torch.arange, kept.shape[:2])).tolist():
        listed = call["kept"][row, head].tolist()
        whole, options_of = [call["key"][row, head]], []
        if "value" in call:
            whole.append(call["value"][row, head])
        for x, name in zip(whole, ("kept_key", "kept_value"), strict=False):
            options_of.append(call[name][row, head] if name in call else x[listed])
        least = float(call["min_similarity"][row, head]) if "min_similarity" in call else -math.inf
        group = call["group"][row].tolist() if "group" in call else [0] * key.shape[2]
        for e, token in enumerate(call["evicted"][row, head].tolist()):
            place, found = int(pivot[row, head, e]), float(similarity[row, head, e])
            allowed = [c >= 0 and token >= 0 and group[c] == group[token] for c in listed]
            rows = [x[token] for x in whole]
            _, best = loops.pivot_of(rows, options_of, allowed)
            if not any(allowed) or best < least - tolerance:
                assert (place, found) == (-1, 0.0)
            elif place < 0:
                # rounding decides whether the best is good enough
                assert best < least + tolerance
                assert found == 0.0
            else:
                assert allowed[place]
                assert abs(found - best) <= tolerance
                assert best >= least - tolerance
                own = loops.pivot_of(rows, [x[place : place + 1] for x in options_of], [True])[1]
                assert best - own <= tolerance


@given(data=st.data())
def test_options_equal_loops(device: torch.device, data: st.DataObject) -> None:
    """Values, groups, thresholds and merged rows in any combination; empty places hold no number that is read."""
    batch, heads, tokens, width, value_width = (data.draw(st.integers(1, top)) for top in (2, 3, 24, 12, 12))
    seed, layout = data.draw(st.integers(0, 2**31)), st.sampled_from(LAYOUTS)
    dtype = data.draw(st.sampled_from(EXACT))
    shape = batch, heads, tokens
    key = laid_out(random(seed, *shape, width, dtype=dtype, device=device), data.draw(layout))
    value = laid_out(random(seed + 1, *shape, value_width, dtype=dtype, device=device), data.draw(layout))
    keep = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    kept, evicted = lists(seed, key, keep)
    options: dict[str, Tensor] = {}
    if data.draw(st.booleans()):
        groups = data.draw(st.integers(1, 4))
        options["group"] = random(seed + 2, batch, tokens, device=device).mul(1e6).int() % groups - 1
    if data.draw(st.booleans()):
        options["min_similarity"] = random(seed + 3, batch, heads, dtype=dtype, device=device) / 4
    if data.draw(st.booleans()):
        options["value"] = value
    for name, wide in (("kept_key", width), ("kept_value", value_width)):
        if (name == "kept_key" or "value" in options) and kept.shape[2] and data.draw(st.booleans()):
            merged = random(seed + 4, *kept.shape, wide, dtype=dtype, device=device)
            options[name] = laid_out(merged.masked_fill(kept[..., None] < 0, float("nan")), data.draw(layout))
    check_options(1e-5 if dtype == torch.float32 else 1e-13, key, kept, evicted, **options)


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32])
@pytest.mark.parametrize("options", [("group",), ("value",), ("group", "value", "kept_key", "kept_value")], ids=str)
def test_options_of_odd_sizes(device: torch.device, options: tuple[str, ...], dtype: torch.dtype) -> None:
    key, value = (random(seed, 2, 2, 130, width, dtype=dtype, device=device) for seed, width in ((0, 64), (1, 80)))
    kept, evicted = lists(1, key, [33, 17])
    every = {
        "group": (torch.arange(130, device=device) // 7 % 5).int().repeat(2, 1),
        "value": value,
        "kept_key": random(2, *kept.shape, 64, dtype=dtype, device=device),
        "kept_value": random(3, *kept.shape, 80, dtype=dtype, device=device),
    }
    check_options(1e-5, key, kept, evicted, **{name: every[name] for name in options})


def test_a_number_is_the_least_similarity_of_every_head(device: torch.device) -> None:
    key = random(0, 2, 3, 40, 4, device=device)
    call = (key, *lists(0, key, [8, 5]))
    plain, alone = nearest_kept(*call), nearest_kept(*call, min_similarity=0.7)
    by_head = nearest_kept(*call, min_similarity=torch.full((2, 3), 0.7, device=device))
    assert all(map(same_bits, alone, by_head))
    below = plain[1] < 0.7
    assert bool(below.any())
    assert bool((~below & (plain[0] >= 0)).any())
    assert same_bits(alone[0], plain[0].masked_fill(below, -1))
    assert same_bits(alone[1], plain[1].masked_fill(below, 0.0))
    assert all(map(same_bits, nearest_kept(*call, min_similarity=-2), plain))


def test_a_similarity_that_just_reaches_the_least_will_do(device: torch.device) -> None:
    """Of axes all cosines are exact."""
    key = torch.eye(4, device=device).repeat(2, 1)[None, None, [0, 1, 2, 4, 7]]
    for least, pivots in ((1.0, [0, -1]), (0.0, [0, 0]), (1.0 + 1e-6, [-1, -1])):
        assert nearest_kept(key, *ranges(key, 3), min_similarity=least)[0].tolist() == [[pivots]]


def test_one_group_is_none_and_an_empty_group_has_no_pivot(device: torch.device) -> None:
    key = random(0, 2, 3, 40, 8, device=device)
    kept, evicted = ranges(key, 10)
    plain = nearest_kept(key, kept, evicted)
    same = nearest_kept(key, kept, evicted, group=torch.full((2, 40), 7, dtype=torch.int32, device=device))
    if not INTERPRETED:
        assert same_bits(same[0], plain[0])
    torch.testing.assert_close(same[1], plain[1])
    # of the tokens after the kept ones, the even are of a group that has no kept token in row 1
    group = torch.zeros(2, 40, dtype=torch.int32, device=device)
    group[1, 10::2] = -3
    pivot, similarity = nearest_kept(key, kept, evicted, group=group)
    assert bool((pivot[1, :, ::2] == -1).all())
    assert not similarity[1, :, ::2].any()
    assert bool((pivot[1, :, 1::2] >= 0).all())
    assert bool((pivot[0] >= 0).all())


@pytest.mark.skipif(INTERPRETED, reason=PLACE_MATTERS)
@pytest.mark.parametrize("keep", [5, 19, 54, 207])
def test_equal_pairs_tie_to_the_lower_index_of_their_group(device: torch.device, keep: int) -> None:
    """The first kept token of the evicted one's group, though one of another group lies before it."""
    key, value = (random(i, 1, 2, 1, 64, device=device).expand(-1, -1, 255, -1).contiguous() for i in (0, 1))
    key[..., 0], key[:, :, 0, 0] = 0.0, -0.0
    group = (torch.arange(255, device=device) % 3).int()[None]
    for options in ({}, {"value": value}):
        pivot, similarity = nearest_kept(key, *ranges(key, keep), group=group, **options)
        assert torch.equal(pivot, group[:, None, keep:].expand_as(pivot))
        torch.testing.assert_close(similarity, torch.ones_like(similarity))


def test_values_decide_between_keys_that_are_equal(device: torch.device) -> None:
    key = random(0, 1, 1, 1, 8, device=device).expand(-1, -1, 6, -1).contiguous()
    value = torch.eye(3, device=device).repeat(2, 1)[None, None]
    pivot, similarity = nearest_kept(key, *ranges(key, 3), value=value)
    assert pivot.tolist() == [[[0, 1, 2]]]
    torch.testing.assert_close(similarity, torch.ones_like(similarity))
    # the mean of both cosines: values that are orthogonal leave half
    alone, halved = nearest_kept(key, *ranges(key, 1), value=value)
    assert not alone.any()
    torch.testing.assert_close(halved, torch.tensor([[[0.5, 0.5, 1.0, 0.5, 0.5]]], device=device))
