"""nearest_kept: the kept key that points the same way."""

from __future__ import annotations

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
